"""Files that a person asked for: whole or not at all, and never in place of a device, a pipe or a link."""

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxgpt.errors import InputError

_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""What leads to a file that this process, or another, has open already."""


def require(option: str, path: Path) -> None:
    """Before the work whose result goes there.

    Raises:
        InputError: nothing can be written there.
    """
    try:
        mode = _mode(path)
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if mode is None and not os.path.isdir(target.parent):
            raise InputError(f"{option}: the folder {target.parent} does not exist; create it first")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{option}: {_short(path)} cannot be a file: {_reason(error)}; name another") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise InputError(f"{option}: {path} is a folder; name a file in it")
    if not os.access(path if mode is not None and in_place(path) else target.parent, os.W_OK):
        raise InputError(f"{option}: {path} cannot be written: no permission; name another file")


def require_distinct(written: Mapping[str, Path], read: Mapping[str, Path]) -> None:
    """Before the work: no result may take the place of another, or of what it is made from.

    Args:
        written: files by the option that names them.
        read: files by what they are called.

    Raises:
        InputError: two are the same file; streams and devices may be shared.
    """
    taken = {os.path.realpath(path): name for name, path in read.items()}
    for option, path in written.items():
        if in_place(path):
            continue
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise InputError(f"{option}: {_short(path)} is the file of {other} too; name another")


def in_place(path: Path) -> bool:
    """A rename would put a file where a device or a pipe is, or away from who reads the stream."""
    mode = _mode(path)
    return mode is not None and (not stat.S_ISREG(mode) or os.path.abspath(path).startswith(_STREAMS))


def _mode(path: Path) -> int | None:
    """Of what a link leads to; None where there is nothing yet."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


@contextmanager
def whole(path: Path) -> Generator[Path]:
    """A file to be filled, which then takes the place of `path`, or is copied into it where that is no regular file.

    Links are followed, so that they stay. When the block raises, nothing was written.

    Raises:
        OSError: it cannot be written.
    """
    through = in_place(path)
    target = Path(os.path.realpath(path))
    folder = Path(tempfile.gettempdir()) if through else target.parent
    partial = folder / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
        if through:
            with partial.open("rb") as source, path.open("ab") as file:
                shutil.copyfileobj(source, file)
        else:
            partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritten(path, error) from error


def append(path: Path, text: str) -> None:
    """Behind what the file holds already, all of the text or none.

    Raises:
        InputError: it cannot be written.
    """
    try:
        before = path.stat().st_size if path.exists() else None
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if not in_place(path):
                _restore(path, before)
            raise
    except OSError as error:
        raise _unwritten(path, error) from error


def _restore(path: Path, size: int | None) -> None:
    with suppress(OSError):
        path.unlink() if size is None else os.truncate(path, size)


def _unwritten(path: Path, error: OSError) -> InputError:
    return InputError(f"{_short(path)}: cannot be written: {_reason(error)}; name another file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _short(path: Path) -> str:
    return shown if len(shown := str(path)) <= 300 else f"{shown[:100]}…{shown[-50:]}"
