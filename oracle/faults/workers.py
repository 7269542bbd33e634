"""Groups of tasks in processes of one core each; answers as they come."""

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from queue import Empty
from typing import Any

Work = Callable[[Any], Any]
"""One task to its answer; a function of a module, so that another process can import it."""


class WorkerFailed(Exception):
    """A process ended before its tasks did; the message is what it said last."""


def answers(
    groups: Sequence[Sequence[Any]], work: Work, processes: int, environment: Mapping[str, str]
) -> Iterator[Any]:
    """The answer of every task of every group. A group stays in one process, so that its tasks share compilations.

    Args:
        groups: lists of tasks; larger ones begin first.
        work: what is done with a task.
        processes: each is bound to one core.
        environment: variables of those processes, which JAX reads when it is imported.

    Raises:
        WorkerFailed: a process ended, or a task raised.
    """
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for group in [*sorted(groups, key=len, reverse=True), *[None] * processes]:
        tasks.put(group)
    cores = _cores()
    workers = [
        context.Process(target=_serve, args=(work, tasks, results, cores[index % len(cores)]), daemon=True)
        for index in range(processes)
    ]
    with _running(workers, environment):
        for _ in range(sum(map(len, groups))):
            yield _next(results, workers)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]


@contextmanager
def _running(workers: Sequence[SpawnProcess], environment: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        for worker in workers:
            worker.start()
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _next(results: Any, workers: Sequence[SpawnProcess]) -> Any:
    while True:
        try:
            kind, answer = results.get(timeout=2)
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                codes = [worker.exitcode for worker in workers]
                raise WorkerFailed(f"the worker processes ended with {codes}") from None
            continue
        if kind == "failed":
            raise WorkerFailed(answer)
        return answer


def _serve(work: Work, tasks: Any, results: Any, core: int) -> None:
    import jax
    import torch

    # Threads of processes that share the cores would only wait for each other.
    if core >= 0:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        while (group := tasks.get()) is not None:
            for task in group:
                results.put(("done", work(task)))
            # The next group is another model: what was compiled would only take memory.
            jax.clear_caches()
    except Exception as error:
        results.put(("failed", f"{type(error).__name__}: {error}"))
