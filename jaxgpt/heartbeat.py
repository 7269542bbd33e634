"""Processes that train together hear of each other all the time; when one falls silent, the others end with one line.

JAX's own heartbeat cannot say it: it ends the process by `abort()`, after a page of its own.
`jax.distributed.initialize` takes no callback, and the one that its client takes
(`missed_heartbeat_callback`) cannot be called in jaxlib 0.10: std::bad_cast. With
`jax_enable_recoverability` the end of process 0 aborts the others all the same. So each process
writes beats into the store of keys that JAX's coordinator has in process 0. Its client
(`global_state.client`) is not public, but JAX's and Orbax's own checkpoints are saved through these
calls of it; they are the same in 0.10 and 0.11.

Process 0 waits for the beat of every other process, and then gives its own, which they wait for
before their next. The value of its beat says whether one of them was silent, so that all end with
the same line. JAX's heartbeat is set to come later, for what these threads cannot see.
"""

import ctypes
import itertools
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LATER = 15
"""Seconds by which JAX's own heartbeat comes after this one."""
AGAIN = "(its own last lines say why); start all of them again, with --resume if a step was saved"
_SLICE = 1.0
"""Seconds of one wait, with a look for the coordinator. Waits are counted, not timed: a process that was itself
suspended is not to blame others."""
_LONGER = 3
"""Seconds for which the others wait more than process 0, which knows who was silent."""
_LAST = 2.0
"""Seconds for an end that has begun already."""


class Heartbeat:
    """Beats of this process, and an ear for those of the others, until `leave`."""

    def __init__(self, seconds: int) -> None:
        """Begin, in threads; JAX must have joined the processes.

        Args:
            seconds: of silence after which a process counts as dead.
        """
        from jax._src import distributed

        state: Any = distributed.global_state
        self._client, self._count = state.client, state.num_processes
        host, _, port = state.coordinator_address.rpartition(":")
        self._coordinator = _met(host.strip("[]"), int(port)) if state.process_id else None
        self._number, self._seconds, self._pause = state.process_id, seconds, seconds / 20
        self._leaving, self._left, self._turn = threading.Event(), threading.Event(), threading.Semaphore()
        _hold_abort()
        tasks = [self._lead] if self._number == 0 else [self._beat, self._follow]
        self._threads = [threading.Thread(target=self._until_left, args=[task], daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Wait until all processes are done, so that none takes this one for dead, and leave them."""
        import jax

        self._leaving.set()
        jax.distributed.shutdown()
        self._left.set()
        self._turn.release()
        # Their waits ended with it; a thread that came out of one after Python's end would crash.
        for thread in self._threads:
            thread.join(2)

    def _until_left(self, task: Callable[[int], None]) -> None:
        import jax

        # What cannot be asked any more is JAX's to tell.
        with suppress(jax.errors.JaxRuntimeError):
            for beat in itertools.count():
                if self._left.is_set():
                    return
                task(beat)

    def _lead(self, beat: int) -> None:
        others = range(1, self._count)
        silent = next((n for n in others if self._heard(n, beat, self._seconds) is None), None)
        said = "" if silent is None else f"process {silent} did not answer for {self._seconds} s"
        self._show(beat, said)
        if said:
            _end(said)
        for number in others:
            self._client.key_value_delete(_key(number, beat))
        if beat:
            self._client.key_value_delete(_key(0, beat - 1))  # whoever gave this beat had heard that one
        self._left.wait(self._pause)

    def _beat(self, beat: int) -> None:
        # A thread of its own: where process 0 hangs, writing never returns.
        self._turn.acquire()
        self._show(beat, "")

    def _follow(self, beat: int) -> None:
        said = self._heard(0, beat, self._seconds + _LONGER)
        if said is None:
            said = f"process 0 did not answer for {self._seconds} s"
        if said:
            _end(said)
        self._turn.release()

    def _show(self, beat: int, said: str) -> None:
        self._client.key_value_set(_key(self._number, beat), said)

    def _heard(self, number: int, beat: int, seconds: float) -> str | None:
        """What a process says with this beat; None if there was none for so long."""
        import jax

        for _ in range(math.ceil(seconds / _SLICE)):
            try:
                return self._client.blocking_key_value_get(_key(number, beat), round(900 * _SLICE))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    if self._leaving.is_set():
                        raise
                    self._left.wait(_SLICE)
            if number == 0 and not self._leaving.is_set() and _nobody_at(self._coordinator):
                return "process 0 has ended"
        return None


def _key(number: int, beat: int) -> str:
    return f"jaxgpt/beat/{number}/{beat}"


def _met(host: str, port: int) -> tuple[str, int] | None:
    """The address at which the coordinator answers, for which no name server will be asked again."""
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            return connection.getpeername()[:2]
    except OSError:
        return None


def _nobody_at(address: tuple[str, int] | None) -> bool:
    """Whether the machine is there and nobody listens any more; one that does not answer may be slow."""
    try:
        if address:
            socket.create_connection(address, timeout=0.1 * _SLICE).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _hold_abort() -> None:
    """JAX aborts at once where process 0 was killed; let that take long enough for our own line and exit code.

    The handler is the C library's `sleep`, with the signal's number (6) as its argument: no Python, which could
    not run there. After it abort() goes on.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _end(said: str) -> None:
    # The main thread may be about to end with a line of its own; and who asks process 0 must be answered.
    time.sleep(_LAST)
    sys.stdout.flush()
    print(f"jaxgpt: {said} {AGAIN}", file=sys.stderr, flush=True)
    os._exit(2)
