"""Checks of config values that come from a file: each refuses, in one line, what a field cannot be."""

from typing import Any

from jaxgpt.errors import InputError

LARGEST = 2**31 - 1
"""Sizes are counted in int32 on the device."""


def size(name: str, value: object) -> None:
    """A count: raises InputError unless it is an integer in [1, 2^31)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise InputError(f"{name} must be a positive integer below 2^31, got {shortened(value)}")


def count(name: str, value: object) -> None:
    """Like a size, but may be 0: raises InputError unless it is an integer in [0, 2^31)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise InputError(f"{name} must be an integer from 0 to 2^31 - 1, got {shortened(value)}")


def positive(name: str, value: Any) -> None:
    """Raises InputError unless it is a positive number that float32 holds as one."""
    if not _is_number(value) or not 1e-38 <= value <= 1e38:
        raise InputError(f"{name} must be a positive number, got {shortened(value)}")


def rate(name: str, value: Any) -> None:
    """Raises InputError unless it is a number in [0, 1)."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise InputError(f"{name} must be in [0, 1), got {shortened(value)}")


def switch(name: str, value: object) -> None:
    """Raises InputError unless it is a boolean."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {shortened(value)}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises InputError unless it is one of the names."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {shortened(value)}")


def shortened(value: object) -> str:
    """`repr` that stays one readable line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
