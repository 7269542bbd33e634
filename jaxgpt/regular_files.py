"""Whether a file that may be absent is there: anything else in its place is refused, not passed over."""

import os
from pathlib import Path

from jaxgpt.errors import InputError


def is_there(path: Path) -> bool:
    """Whether a file is there, itself or by a link; it is not opened, for a pipe would wait for whoever writes into it.

    Raises:
        InputError: a folder, pipe, device or a link to nothing in its place, or a folder that may not be looked into.
    """
    try:
        if path.is_file():
            return True
        there = os.path.lexists(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if there:
        what = "a link to nothing" if path.is_symlink() and not path.exists() else "a folder, pipe or device"
        raise InputError(f"{path} is {what}, not a file; put the file there, or remove it")
    return False
