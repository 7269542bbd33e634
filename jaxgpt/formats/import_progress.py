"""How far an import is, in bytes: what lies on the disk, what was hashed, what was compared.

Orbax does not say how much it has written, so the files that it writes are looked at.
"""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from jaxgpt.checkpoint import Saving

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread but never from two at once."""
_SECONDS = 0.1
"""Between two looks."""


class Meter:
    """The stages of an import, each of which handles every byte of the weights once."""

    def __init__(self, progress: Progress | None, size: int, stages: tuple[str, ...]) -> None:
        self._progress, self._size = progress, size
        self._done = dict.fromkeys(stages, 0)
        self._lock = Lock()

    def add(self, stage: str, size: int) -> None:
        """So many bytes more of a stage."""
        self.reach(stage, self._done[stage] + size)

    def end(self, stage: str) -> None:
        """All of a stage."""
        self.reach(stage, self._size)

    def reach(self, stage: str, size: int) -> None:
        """So many bytes of a stage in all; what lies beside the weights does not count, nor does a smaller number."""
        with self._lock:
            size = min(size, self._size)
            if self._progress is not None and size > self._done[stage]:
                self._done[stage] = size
                self._progress(sum(self._done.values()), self._size * len(self._done))

    def watch(self, stage: str, saving: Saving, folder: Path) -> None:
        """Wait for a save into a folder that was empty, and count what lies there."""
        while self._progress is not None and not saving.ended(within=_SECONDS):
            self.reach(stage, _bytes_below(folder))


def _bytes_below(folder: Path) -> int:
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.stat(os.path.join(path, name)).st_size
            except OSError:  # renamed meanwhile
                continue
    return found
