"""What was recorded of one run: its taps in execution order, and what they depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from jaxgpt.errors import InputError

EXACT_KINDS = "biu"
"""Kinds of numpy dtype that have no rounding: booleans and integers."""


@dataclass(frozen=True)
class Trace:
    """One run."""

    taps: Mapping[str, np.ndarray]
    """Every recorded value by name, in execution order."""
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """What the run was given."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions, device, precision: what a difference may come from that is nobody's bug."""
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of what is missing among the taps, each with the reason."""

    def __post_init__(self) -> None:
        if not self.taps:
            raise InputError("nothing was recorded: the run gave no array; check include and exclude")
        for name in (*self.taps, *self.inputs, *self.left_out):
            check_name(name)


def check_name(name: str) -> None:
    """A name is printed, and written in map files: it must survive both.

    Raises:
        InputError: empty, or with a character that does not print.
    """
    if not name or not name.isprintable():
        raise InputError(f"{name!r} is no name for a tap: names are printable text; rename it")


def epsilon(dtype: np.dtype) -> float:
    """Distance from 1 to the next number of a floating dtype; 0 for integers and booleans."""
    return 0.0 if dtype.kind in EXACT_KINDS else float(ml_dtypes.finfo(dtype).eps)
