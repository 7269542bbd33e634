"""Processes that fall silent, played by threads over a store of keys such as JAX's coordinator has."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax._src import distributed

from jaxgpt import heartbeat, processes
from jaxgpt.heartbeat import Heartbeat

pytestmark = pytest.mark.slow

SILENCE = 4
"""Seconds; a busy machine may not get to a thread for one or two."""


class Store:
    """What a process's client of JAX does, for all of them."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.changed = threading.Condition()
        self.lost: set[int] = set()
        self.closed = False

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if int(key.split("/")[2]) not in self.lost:
                self.keys[key] = value
                self.changed.notify_all()

    def key_value_delete(self, key: str) -> None:
        del self.keys[key]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            there = self.changed.wait_for(lambda: self.closed or key in self.keys, timeout_in_ms / 1000)
            if there and not self.closed:
                return self.keys[key]
        raise jax.errors.JaxRuntimeError("CANCELLED" if self.closed else "DEADLINE_EXCEEDED: GetKeyValue() timed out")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Run:
    """Three processes that listen to each other, and what each of them said at its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.said = Store(), {}
        self.coordinator = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(heartbeat, "_SLICE", 0.05)
        monkeypatch.setattr(heartbeat, "_LONGER", 2)
        monkeypatch.setattr(heartbeat, "_hold_abort", lambda: None)
        monkeypatch.setattr(heartbeat, "_end", self.end)
        all_are_done = threading.Barrier(3, action=self.store.close)
        monkeypatch.setattr(jax.distributed, "shutdown", lambda: all_are_done.wait(10))
        self.joined: list[Heartbeat] = []
        for number in range(3):
            address = f"127.0.0.1:{self.coordinator.getsockname()[1]}"
            state: Any = SimpleNamespace(
                client=self.store, process_id=number, num_processes=3, coordinator_address=address
            )
            monkeypatch.setattr(distributed, "global_state", state)
            self.joined.append(Heartbeat(SILENCE))

    def end(self, said: str) -> None:
        number = next(n for n, one in enumerate(self.joined) if threading.current_thread() in one._threads)
        self.said[number] = said
        raise jax.errors.JaxRuntimeError("ended")

    def leave(self) -> None:
        leaving = [threading.Thread(target=one.leave) for one in self.joined]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()

    def all_said(self, count: int) -> dict[int, str]:
        deadline = time.monotonic() + 60
        while len(self.said) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.said


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Generator[Run]:
    found = Run(monkeypatch)
    yield found
    found.leave()
    found.coordinator.close()


def test_a_silent_process_is_named_by_all_the_others(run: Run):
    time.sleep(0.3)
    assert not run.said
    run.store.lost.add(2)
    said = f"process 2 did not answer for {SILENCE} s"
    # The third one hears of itself: it may be the network that was silent.
    assert run.all_said(3) == dict.fromkeys(range(3), said)


def test_a_silent_first_process_is_named_by_those_who_hear_it(run: Run):
    run.store.lost.add(0)
    said = run.all_said(3)
    assert (said[1], said[2]) == (f"process 0 did not answer for {SILENCE} s",) * 2


def test_a_first_process_that_is_not_there_any_more_is_found_out_at_once(run: Run):
    run.coordinator.close()
    run.store.lost.add(0)
    began = time.monotonic()
    assert run.all_said(2) == dict.fromkeys((1, 2), "process 0 has ended")
    assert time.monotonic() - began < SILENCE


def in_step(store: Store) -> bool:
    """What was heard is forgotten, and nobody runs ahead. Between a beat and the removal of the last both are there."""
    beats = sorted(int(key.split("/")[3]) for key in list(store.keys))
    return bool(beats) and beats[0] > 4 and beats[-1] <= beats[0] + 1


def test_who_leaves_is_heard_of_no_more_and_its_threads_end(run: Run):
    deadline = time.monotonic() + 60
    while not (found := in_step(run.store)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found, run.store.keys
    run.leave()
    assert not any(thread.is_alive() for one in run.joined for thread in one._threads)
    assert not run.said


def test_an_abort_leaves_time_to_end_with_a_line_and_a_code():
    words = (
        "import ctypes, threading\n"
        "from jaxgpt import heartbeat\n"
        "heartbeat._LAST = 0.3\n"
        "heartbeat._hold_abort()\n"
        "threading.Thread(target=heartbeat._end, args=['process 0 has ended']).start()\n"
        "ctypes.CDLL(None).abort()\n"
    )
    ran = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (2, f"jaxgpt: process 0 has ended {heartbeat.AGAIN}\n")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_collective_without_its_other_side_is_told_from_other_mistakes(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.lost(kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert not processes.lost(kind("shapes do not fit"))
