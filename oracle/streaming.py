"""A reference's taps one at a time, as its forward computes them.

Holding every activation of two models in float64 and one in float32 would cost
several times their weights. So each forward runs in a thread of its own that waits
until its last tap has been taken; two such forwards advance in step.
"""

from collections.abc import Callable, Generator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread

import torch

from oracle.echo import OnTap, silent

Taps = Generator[tuple[str, torch.Tensor], None, None]
Item = tuple[str, torch.Tensor] | BaseException | None


class _Closed(BaseException):
    """Nobody wants the remaining taps."""


class _Sink(dict[str, torch.Tensor]):
    """The `taps` argument of a forward: what is stored in it is handed on, not kept."""

    def __init__(self, queue: "Queue[Item]", closed: Event, on_tap: OnTap):
        super().__init__()
        self._queue, self._closed, self._on_tap = queue, closed, on_tap

    def __setitem__(self, tap: str, value: torch.Tensor) -> None:
        value = self._on_tap(tap, value)
        # The forward goes on with what is held under the tap's name.
        self.clear()
        super().__setitem__(tap, value)
        self.hand_on((tap, value))

    def hand_on(self, item: Item) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except Full:
                continue
        raise _Closed


def stream(forward: Callable[[dict[str, torch.Tensor]], object], on_tap: OnTap = silent) -> Taps:
    """The (tap, value) pairs that `forward(taps)` stores, in the order it does; its exceptions are raised here."""
    queue: Queue[Item] = Queue(maxsize=1)
    closed = Event()
    sink = _Sink(queue, closed, on_tap)

    def work() -> None:
        with suppress(_Closed):
            try:
                forward(sink)
                sink.hand_on(None)
            except Exception as error:
                # Left to the thread it would only be printed; the consumer raises it.
                sink.hand_on(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        with suppress(Empty):  # or the forward would wait for room until it looks whether anybody reads
            queue.get_nowait()
        thread.join()


class Reader:
    """Takes taps by name from a stream; what arrives earlier than asked for waits."""

    def __init__(self, items: Taps):
        self._items = items
        self._waiting: dict[str, torch.Tensor] = {}

    def take(self, tap: str) -> torch.Tensor | None:
        """The tap's value, or None if the forward never stores it."""
        while tap not in self._waiting:
            item = next(self._items, None)
            if item is None:
                return None
            self._waiting[item[0]] = item[1]
        return self._waiting.pop(tap)

    def rest(self) -> list[str]:
        """Names of all taps that nobody took."""
        self._waiting.update(self._items)
        return list(self._waiting)
