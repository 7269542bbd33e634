"""One process at a time writes into a run folder."""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from jaxgpt.errors import InputError
from jaxgpt.step_folder import refuse_taken

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What some file systems of clusters answer, mounted without locks."""


class RunLock:
    """An advisory lock on the folder itself: nothing is left behind, and it ends with the process.

    Entering locks a folder that exists; `acquire` also makes one. Two runs in one
    folder would delete each other's unfinished saves and mix their logs.
    """

    def __init__(self, folder: str | Path, *, wanted: bool = True):
        """`wanted` is False in processes that leave all writing to another of their run."""
        self.folder = Path(folder)
        self._wanted = wanted
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if self.folder.is_dir():
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def acquire(self) -> None:
        """Lock the folder, making it first; does nothing when it is locked by this object.

        Raises:
            InputError: another run holds it.
        """
        if self._descriptor is not None or not self._wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"another run is writing into {self.folder}; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        self._descriptor = descriptor


@contextmanager
def filling(folder: Path) -> Generator[None]:
    """The lock of a folder that one command fills; where nothing was saved in it, it goes again.

    Raises:
        InputError: another command is filling it, or something is in it.
    """
    with RunLock(folder) as lock:
        lock.acquire()
        refuse_taken(folder)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
            raise
