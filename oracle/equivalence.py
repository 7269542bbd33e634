"""Every family, shape and dtype against the reference, and planted faults that must be found.

Each random Hugging Face folder is written without the product, imported by it, and
the checkpoint compared with the folder. Then the oracle is shown to fail: a sample of
the fault catalogue is planted, and each fault must be found where it begins.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxgpt.errors import InputError
from oracle import agreement, ladder, models, noise, subject, workers
from oracle.faults import mutants, trial
from oracle.faults.mutants import Mutant
from oracle.noise import Calibration
from oracle.reference import DTYPES
from oracle.reports import junit, page, summary, terminal
from oracle.reports.outcome import Outcome
from oracle.results import Report

SEED = 30_000
"""Of weights and inputs; neither a calibration nor a fault has it."""
TRAINED = ("gpt2", "llama")
"""Models that are compared with trained weights as well."""
PLANTED = 24
"""Faults of the catalogue's sample."""


@dataclass(frozen=True)
class Task:
    """One comparison."""

    model: str
    dtype: str
    kind: str = "random"
    mutant: str = ""
    """Id of the mutant to find; empty for a true model."""
    calibration: Path | None = None
    """File of the limits; None for those that come with the oracle."""

    @property
    def name(self) -> str:
        """For people and file names."""
        if self.mutant:
            _, faults, *_ = self.mutant.split(" | ")
            return f"planted: {faults}, {self.model} {self.dtype}"
        return f"{self.model} {self.dtype}{'' if self.kind == 'random' else ' ' + self.kind}"


def tasks(calibration: Path | None) -> list[list[Task]]:
    """In groups that share their compilations, those that take long first."""
    true = [
        [Task(model, dtype, kind, calibration=calibration) for dtype in DTYPES for kind in _kinds(model)]
        for model in sorted(models.MODELS, key=_cost, reverse=True)
    ]
    planted: dict[tuple[str, str], list[Task]] = {}
    for mutant in mutants.sampled(mutants.catalogue(), PLANTED, SEED):
        task = Task(mutant.model, mutant.dtype, mutant=mutant.id, calibration=calibration)
        planted.setdefault((mutant.model, mutant.dtype), []).append(task)
    return [*true, *planted.values()]


def _kinds(model: str) -> tuple[str, ...]:
    return ("random", "trained") if model in TRAINED else ("random",)


def _cost(model: str) -> int:
    config = models.MODELS[model]
    layers, context = (config.get(a) or config[b] for a, b in (("n_layer", "num_hidden_layers"), _CONTEXT))
    return layers * context


_CONTEXT = ("n_positions", "max_position_embeddings")


# -- One comparison --------------------------------------------------------------------


def answer(task: Task) -> Outcome:
    """Carry out a task."""
    start = time.perf_counter()
    calibration = _calibration(task.calibration)
    if task.mutant:
        mutant = mutant_of(task)
        report = ladder.climb(trial.compared(mutant, calibration))
        wrong = misplaced(mutant, report)
    else:
        report, wrong = compared(task, calibration), ""
    seconds = time.perf_counter() - start
    rungs = tuple(ladder.LADDER)
    return Outcome(task.name, report, seconds, planted=bool(task.mutant), wrong=wrong, rungs=rungs)


@cache
def _calibration(path: Path | None) -> Calibration:
    return noise.load(path) if path else noise.stored_calibration()


def mutant_of(task: Task) -> Mutant:
    """The mutant that a task is to find."""
    return _catalogue()[task.mutant]


@cache
def _catalogue() -> dict[str, Mutant]:
    return {mutant.id: mutant for mutant in mutants.catalogue()}


def compared(task: Task, calibration: Calibration) -> Report:
    """A true model through the product's importer, loader and exporter."""
    with TemporaryDirectory() as place:
        folder, checkpoint = Path(place, "hf"), Path(place, "jaxgpt")
        models.write(models.MODELS[task.model], folder, task.dtype, SEED, task.kind)
        subject.import_folder(folder, checkpoint)
        return subject.compare(checkpoint, folder, task.dtype, calibration, seed=SEED)


def misplaced(mutant: Mutant, report: Report) -> str:
    """How the answer differs from the right one."""
    record = trial.judged(mutant, report)
    if record["exact"]:
        return ""
    rung, tap = mutant.expected[0]
    found = f"found in {' at '.join(record['found'])}" if record["found"] else f"not found: {report.verdict}"
    return f"{found}, expected in {rung} at {tap}"


# -- All of them -----------------------------------------------------------------------


def show(out: Path, calibration: Path | None = None) -> list[Outcome]:
    """Run everything, print a line each, write the reports.

    `out` gets a JSON report for each comparison and an HTML page for each that did not
    answer as it must, and `junit.xml` and `summary.md` for all.

    Raises:
        InputError: the folder cannot be made, or the calibration is none.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {out}: {error.strerror}") from error
    _calibration(calibration)
    outcomes = list(_shown(workers.answers(tasks(calibration), answer), out))
    outcomes.sort(key=lambda outcome: (outcome.planted, outcome.name))
    (out / "junit.xml").write_text(junit.render(outcomes), encoding="utf-8")
    (out / "summary.md").write_text(summary.render(outcomes), encoding="utf-8")
    print("| agreement | measured | target | reached |\n|---|---|---|---|")
    for figure in agreement.figures(outcomes):
        print(figure.row())
    failed = sum(not outcome.ok for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return outcomes


def _shown(outcomes: Iterable[Outcome], out: Path) -> Iterator[Outcome]:
    for outcome in outcomes:
        file = out / _file_name(outcome.name)
        document = outcome.report.to_dict()
        file.with_suffix(".json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if not outcome.ok:
            file.with_suffix(".html").write_text(page.render(outcome.report), encoding="utf-8")
        print(line(outcome), flush=True)
        yield outcome


def _file_name(name: str) -> str:
    kept = "".join(char if char.isalnum() or char in "-_." else " " for char in name)
    # `with_suffix` must not take part of the name for a suffix.
    return "-".join(kept.split()).replace(".", "_") + ".report"


def line(outcome: Outcome) -> str:
    """One comparison in one line."""
    return f"{'PASS' if outcome.ok else 'FAIL'}  {outcome.name:<60} {outcome.seconds:5.1f} s  {_detail(outcome)}"


def _detail(outcome: Outcome) -> str:
    if outcome.wrong or not outcome.ok:
        return outcome.message
    if outcome.planted:
        first = outcome.report.first_divergence()
        return f"found in {first['rung']} at {first['tap']}" if first else ""
    kl = next((f.error for rung in outcome.report.rungs for f in rung.findings if f.op == "kl"), 0.0)
    return f"KL {kl:.0e}; {outcome.report.rungs[-1].summary}"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all answered as they must and agree closely; 3 if what did not was inconclusive, else 1."""
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    if not wrong:
        return terminal.PASS if all(figure.ok for figure in agreement.figures(outcomes)) else terminal.FAIL
    undecided = all(outcome.report.verdict == "inconclusive" for outcome in wrong)
    return terminal.INCONCLUSIVE if undecided else terminal.FAIL
