"""SIGINT, SIGTERM and SIGHUP end a run after its present step, in all its processes at the same one; all else at once.

One that was ignored when the command began, as `nohup` does, stays ignored.
"""

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = 0.1
"""Seconds until an interrupt that was swallowed, or could not be raised, is tried again."""


class StopSignals:
    """What a run was told by signals."""

    def __init__(self) -> None:
        self.by = ""
        """The signal that reached this process."""
        self._agreed = False

    def told(self) -> bool:
        """Whether a signal reached one of the processes; all must ask at the same places."""
        from jaxgpt import processes

        if not self._agreed and processes.any_of(bool(self.by)):
            self._agreed, self.by = True, self.by or "a signal to another process"
        return self._agreed

    @contextmanager
    def watched(self) -> Generator[None]:
        """Take the signals inside, and one that came before and is not heeded yet; a second SIGINT ends at once."""

        def stop(number: int, _: Any) -> None:
            if self.by and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.by = signal.Signals(number).name

        with _handled(stop):
            if _interrupts:
                _interrupts.rest()
            self.by = self.by or told()
            yield


class _Interrupts:
    """KeyboardInterrupt for each signal, again and again until it is heeded."""

    def __init__(self) -> None:
        self.by = ""
        """The first signal."""
        self._raised = False
        self._timer: threading.Timer | None = None
        self._hook = sys.unraisablehook

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._raised and number != signal.SIGINT:
            return  # a terminal that closes and its shell both say so: who cleans up is left in peace
        self.by = self.by or signal.Signals(number).name
        # jaxlib does not survive an exception while it is imported: SIGSEGV.
        self._raised = not _importing(frame)
        if self._raised:
            raise KeyboardInterrupt
        self._try_again()

    def swallowed(self, ignored: "sys.UnraisableHookArgs") -> None:
        """Hear of an exception that went nowhere, as of JAX's callback of the garbage collector."""
        if self.by and ignored.exc_type is KeyboardInterrupt:
            self._raised = False
            self._try_again()
        else:
            self._hook(ignored)

    def rest(self) -> None:
        """Try no more."""
        self._raised = True
        if self._timer:
            self._timer.cancel()

    def _try_again(self) -> None:
        self._timer = threading.Timer(_AGAIN, self._send)
        self._timer.daemon = True
        self._timer.start()

    def _send(self) -> None:
        main = threading.main_thread().ident
        if main and not self._raised:
            signal.pthread_kill(main, signal.Signals[self.by])


_interrupts: _Interrupts | None = None


def told() -> str:
    """The signal that came inside `interrupting`, if one did, even where its KeyboardInterrupt was swallowed."""
    return _interrupts.by if _interrupts else ""


@contextmanager
def interrupting() -> Generator[None]:
    """All of the signals raise KeyboardInterrupt inside: around what has nothing to save."""
    global _interrupts
    if _interrupts or threading.current_thread() is not threading.main_thread():
        yield
        return
    _interrupts, before = _Interrupts(), sys.unraisablehook
    sys.unraisablehook = _interrupts.swallowed
    try:
        with _handled(_interrupts.take):
            try:
                yield
            finally:
                _interrupts.rest()
    finally:
        _interrupts, sys.unraisablehook = None, before


def _importing(frame: FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    taken = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, handler) for number in taken}
    except ValueError:  # not the main thread: the caller owns the signals
        yield
        return
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
