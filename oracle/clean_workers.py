"""Clean runs in several processes: each takes a group of runs that share their compilations."""

import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from queue import Empty

import jax
import torch

from oracle import clean
from oracle.clean import Record, Run

Tasks = Queue  # of list[Run] | None
Answers = Queue  # of Record | str


class WorkerFailed(Exception):
    """A process ended before its runs did; the message is what it said last."""


def records(runs: Sequence[Run], processes: int) -> Iterator[Record]:
    """The record of every run, as they end.

    Raises:
        NotClean: from this process, if there is only one.
        WorkerFailed: from another.
    """
    groups = sorted(clean.groups(runs), key=_cost, reverse=True)
    if processes < 2:
        for group in groups:
            yield from _carried_out(group)
        return
    context = multiprocessing.get_context("spawn")
    tasks, answers = context.Queue(), context.Queue()
    for group in [*groups, *[None] * processes]:
        tasks.put(group)
    workers = [context.Process(target=_work, args=(tasks, answers), daemon=True) for _ in range(processes)]
    with _running(workers):
        for _ in runs:
            yield _next(answers, workers)


def _cost(group: Sequence[Run]) -> int:
    """Roughly: long groups begin first, so that the processes end together."""
    config = clean.CONFIGS[group[0].model]
    return len(group) * (config.get("n_layer") or config["num_hidden_layers"])


def _carried_out(group: Sequence[Run]) -> Iterator[Record]:
    for run in group:
        yield clean.measured(run)
    # The next group is of another model, and compilations would only take memory.
    jax.clear_caches()


@contextmanager
def _running(workers: Sequence[SpawnProcess]) -> Generator[None]:
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _next(answers: Answers, workers: Sequence[SpawnProcess]) -> Record:
    while True:
        try:
            answer = answers.get(timeout=2)
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                codes = [worker.exitcode for worker in workers]
                raise WorkerFailed(f"the worker processes ended with {codes}") from None
            continue
        if isinstance(answer, str):
            raise WorkerFailed(answer)
        return answer


def _work(tasks: Tasks, answers: Answers) -> None:
    # Two processes on two cores: threads of torch would only wait for each other.
    torch.set_num_threads(1)
    try:
        while (group := tasks.get()) is not None:
            for answer in _carried_out(group):
                answers.put(answer)
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")
