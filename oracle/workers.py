"""Work in several processes: each takes a group of tasks that share what is slow to make, such as compilations."""

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from queue import Empty
from threading import Thread
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import torch

Task = TypeVar("Task")
Answer = TypeVar("Answer")

MOST = 2
"""Processes; each holds JAX, torch and its own compilations."""
PATIENCE = 2.0
"""Seconds without an answer after which it is asked whether the processes still live."""


class WorkerFailed(Exception):
    """A process ended before its tasks did; the message is what it said last."""


def affordable(tasks: int) -> int:
    """A GPU is not shared; nor is it worth while to start processes for a few tasks."""
    return min(MOST, os.cpu_count() or 1) if tasks > MOST and jax.default_backend() == "cpu" else 1


def answers(
    groups: Sequence[Sequence[Task]],
    work: Callable[[Task], Answer],
    processes: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Answer]:
    """The answer of every task, as they come.

    Args:
        groups: tasks that one process does one after the other; what begins first is first.
        work: a function of a module, as it is sent to other processes.
        processes: 1 for this one; by default what is affordable, each bound to a core.
        environment: variables of the other processes, which JAX reads when it is imported.

    Raises:
        WorkerFailed: a task of another process failed; one of this process raises what it does.
    """
    count = sum(map(len, groups))
    processes = affordable(count) if processes is None else processes
    if processes < 2:
        for group in groups:
            yield from _done(group, work)
        return
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for group in [*groups, *[None] * processes]:
        tasks.put(group)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    running = [
        context.Process(target=_serve, args=(tasks, results, work, cores[index % len(cores)]), daemon=True)
        for index in range(processes)
    ]
    with _started(running, environment):
        for _ in range(count):
            yield _next(results, running)


def _done(group: Sequence[Task], work: Callable[[Task], Answer]) -> Iterator[Answer]:
    for task in group:
        yield work(task)
    # The next group is of another model, and compilations would only take memory.
    jax.clear_caches()


@contextmanager
def _started(processes: Sequence[SpawnProcess], environment: Mapping[str, str]) -> Generator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        for process in processes:
            process.start()
    finally:
        for name in environment:
            os.environ.pop(name)
        os.environ.update(before)
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _next(results: "Queue[Any]", processes: Sequence[SpawnProcess]) -> Any:
    while True:
        try:
            failed, answer = results.get(timeout=PATIENCE)
        except Empty:
            if not any(process.is_alive() for process in processes):
                codes = [process.exitcode for process in processes]
                raise WorkerFailed(f"the worker processes ended with exit codes {codes}") from None
            continue
        if failed:
            raise WorkerFailed(answer)
        return answer


def _serve(tasks: "Queue[Any]", results: "Queue[Any]", work: Callable[[Any], Any], core: int | None) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    # As many processes as cores: threads of torch and XLA would only wait for each other.
    torch.set_num_threads(1)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        while (group := tasks.get()) is not None:
            for answer in _done(group, work):
                results.put((False, answer))
    except Exception as error:
        results.put((True, f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A parent that was killed takes nobody with it, and its tasks would be done for no one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
