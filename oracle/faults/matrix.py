"""The measured matrix: every mutant before the oracle, pairs of them, unknown faults, and true models.

Results are appended to a JSONL file as they come, so that an interrupted run goes on
where it stopped; `oracle.faults.figures` makes the tables of it.
"""

import json
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import clean, models, weight_kinds, workers
from oracle.faults import mutants, trial
from oracle.faults.mutants import BOTH, Mutant
from oracle.faults.trial import Record

RESULTS = "mutants.jsonl"
UNOPTIMIZED = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Most of a mutant's time is LLVM optimizing programs that run once. Clean runs are optimized as users' are."""
GROUP = 40
"""Mutants of one model in one process: enough to share compilations, few enough to spread over processes."""
FIRST_SEED = 10_000
"""Of clean runs; calibrations stay below."""
RARE = 10
"""Every so many-th clean run has briefly trained weights, which take seconds to make."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    mutants: Sequence[Mutant]
    pairs: Sequence[Mutant]
    skipped_pairs: Sequence[tuple[str, str]]
    held_out: Sequence[Mutant]
    clean: Sequence[clean.Run]

    @property
    def planted(self) -> list[Mutant]:
        """Everything but true models."""
        return [*self.mutants, *self.pairs, *self.held_out]


def plan(*, sample: int | None, pairs: int, runs: int, seed: int, only: str) -> Plan:
    """The whole matrix; of the mutants only a sample, or only those of one class.

    Args:
        sample: so many mutants, chosen by `seed`; None for all.
        pairs: double faults.
        runs: clean runs.
        seed: of what is chosen at random.
        only: a class, to which pairs and unknown faults do not belong; empty for all.
    """
    known, unknown = mutants.catalogue(), mutants.held_out()
    if only:
        known, unknown, pairs = [m for m in known if m.faults[0].name == only], [], 0
    if sample is not None:
        known, unknown = mutants.sampled(known, sample, seed), mutants.sampled(unknown, sample, seed)
    double, skipped = mutants.pairs(pairs, seed)
    return Plan(known, double, skipped, unknown, clean_runs(runs, seed))


def clean_runs(count: int, seed: int) -> list[clean.Run]:
    """Over models, dtypes and kinds of weights in turn, each with its own seed."""
    names = [name for name in models.MODELS if name not in clean.LONG]
    kinds = [kind for kind in weight_kinds.KINDS if kind != "trained"]
    rng = random.Random(seed)
    runs: list[clean.Run] = []
    for number in range(count):
        model, dtype = names[number % len(names)], BOTH[number // len(names) % 2]
        kind = "trained" if rng.randrange(RARE) == 0 else rng.choice(kinds)
        runs.append(clean.Run(model, kind, dtype, FIRST_SEED + 100_000 * seed + number))
    return runs


def measure(chosen: Plan, out: Path, processes: int, progress: Callable[[str], None]) -> list[Record]:
    """Carry out what `out` does not hold yet; all records of the plan, in its order.

    Raises:
        WorkerFailed: a process ended before its work did; what was measured is kept.
    """
    results = out / RESULTS
    records = read(results)
    todo = [mutant for mutant in chosen.planted if mutant.id not in records]
    left = [run for run in chosen.clean if clean_id(run) not in records]
    with results.open("a") as file:
        for record in _carried_out(todo, left, processes, progress):
            file.write(json.dumps(record) + "\n")
            file.flush()
            records[record["id"]] = record
    wanted = [*(mutant.id for mutant in chosen.planted), *map(clean_id, chosen.clean)]
    # What counts as a right name may have been written down since.
    return [records[id] if records[id]["table"] == "clean" else trial.named(records[id]) for id in wanted]


def clean_id(run: clean.Run) -> str:
    """The id of a clean run's record."""
    return f"clean | {run.name}"


def _carried_out(
    todo: Sequence[Mutant], left: Sequence[clean.Run], processes: int, progress: Callable[[str], None]
) -> Iterator[Record]:
    start = time.perf_counter()
    stages: tuple[tuple[str, list[list[Any]], Callable[[Any], Record], Mapping[str, str]], ...] = (
        ("mutants", [[m.key for m in group] for group in mutant_groups(todo)], trial.tried, UNOPTIMIZED),
        ("clean runs", list(clean.groups(left)), trial.untouched, {}),
    )
    for title, groups, work, variables in stages:
        total = sum(map(len, groups))
        if not total:
            continue
        with _environment(variables):
            for number, record in enumerate(workers.answers(groups, work, processes), start=1):
                progress(f"{number}/{total} {title}, {time.perf_counter() - start:.0f} s: {line(record)}")
                yield record


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    """Of the processes that are started meanwhile; JAX reads it when it is imported."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(before)


def line(record: Record) -> str:
    """One result in a line."""
    if record["table"] == "clean":
        alarm = f"FALSE ALARM in {record['rung']} at {record['tap']}" if record["verdict"] != "pass" else "pass"
        return f"{record['id']}: {alarm}"
    place = f"{record['found'][0]} at {record['found'][1]}" if record["found"] else record["verdict"]
    names = ", ".join(cause["name"] for cause in record["causes"]) or "no cause"
    marks = "".join(
        mark if record[key] else "-" for mark, key in (("D", "detected"), ("E", "exact"), ("N", "named_first"))
    )
    return f"{marks} {' + '.join(record['faults'])}, {record['model']} {record['dtype']}: {place}: {names}"


def mutant_groups(todo: Sequence[Mutant]) -> list[list[Mutant]]:
    """Mutants of one model and dtype, at most `GROUP`; large groups first, so that processes end together."""
    return sorted(_cut(todo, lambda mutant: (mutant.model, mutant.dtype), GROUP), key=len, reverse=True)


def _cut(items: Sequence[Any], key: Callable[[Any], Any], most: int) -> list[list[Any]]:
    by_key: dict[Any, list[Any]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    return [group[at : at + most] for group in by_key.values() for at in range(0, len(group), most)]


def read(results: Path) -> dict[str, Record]:
    """Records by id; a last line that an interruption cut short is left out."""
    records: dict[str, Record] = {}
    for text in results.read_text().splitlines() if results.exists() else []:
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        records[record["id"]] = record
    return records
