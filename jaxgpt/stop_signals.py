"""SIGTERM and SIGINT end a run after its present step, in all its processes at the same one."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from jaxgpt import processes


class StopSignals:
    """What a run was told by signals."""

    def __init__(self) -> None:
        self.by = ""
        """The signal that reached this process."""
        self._agreed = False

    def told(self) -> bool:
        """Whether a signal reached one of the processes; all must ask at the same places."""
        if not self._agreed and processes.any_of(bool(self.by)):
            self._agreed, self.by = True, self.by or "a signal to another process"
        return self._agreed

    @contextmanager
    def watched(self) -> Generator[None]:
        """Take the signals inside; a second SIGINT ends the run at once."""

        def stop(number: int, _: Any) -> None:
            if self.by and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.by = signal.Signals(number).name

        with _handled(stop, signal.SIGTERM, signal.SIGINT):
            yield


@contextmanager
def interrupting() -> Generator[None]:
    """SIGTERM is what SIGINT is inside: around a run, where there is nothing to save."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Generator[None]:
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: the caller owns the signals
        yield
        return
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
