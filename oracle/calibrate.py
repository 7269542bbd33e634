"""Where the limits come from: clean runs, of which the largest ratios are stored.

Models of both families, tiny ones and ones of real width, in every dtype, over
seeds, compiled and op by op. A limit is `FACTOR` times the largest ratio that any
clean run of that op, dtype and rung reached; an op that was always exact (a
reshape, a lookup) must stay exact.
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from oracle import ladder, models, noise
from oracle.comparison import Comparison
from oracle.reference import DTYPES, Reference
from oracle.results import Finding, Report
from oracle.rungs import decode, environment, forward, operators

FACTOR = 4.0
"""From the largest clean ratio to the limit. Clean ratios vary by about two between
seeds; the faults of `oracle.faults` are beyond a hundred in bf16, and 1e6 in fp32."""
SEEDS = 8
WIDE_SEEDS = 2


@dataclass(frozen=True)
class Run:
    """One clean run."""

    model: str
    dtype: str
    seed: int
    jit: bool


def plan() -> Iterator[Run]:
    """Every run; op by op (without jit) once for each family, without the decode rung."""
    for dtype in DTYPES:
        yield from (Run(name, dtype, 0, jit=False) for name in ("gpt2", "llama"))
        yield from (Run(name, dtype, seed, jit=True) for name in models.MODELS for seed in range(SEEDS))
        yield from (Run(name, dtype, seed, jit=True) for name in models.WIDE for seed in range(WIDE_SEEDS))


def carry_out(run: Run) -> Report:
    """One clean comparison without limits."""
    with TemporaryDirectory() as place:
        folder = models.write((models.MODELS | models.WIDE)[run.model], Path(place), run.dtype, run.seed)
        reference = Reference.load(folder, run.dtype)
        candidate = models.candidate(folder, run.dtype)
        comparison = Comparison(candidate, reference, folder, folder, ladder.uncalibrated(), run.seed)
        rungs = [operators.NAME, forward.NAME, *([decode.NAME] if run.jit else [])]
        with jax.disable_jit(not run.jit):
            return ladder.climb(comparison, everything=True, rungs=rungs)


Maxima = dict[str, dict[str, dict[str, list[float]]]]


def widen(maxima: Maxima, dtype: str, report: Report) -> None:
    """Take a clean run's ratios into the maxima.

    Raises:
        AssertionError: the run was not clean (a shape, a mask or a boolean differs).
    """
    for rung in report.rungs:
        ops = maxima.setdefault(rung.name, {}).setdefault(dtype, {})
        for finding in rung.findings:
            assert finding.ok, (rung.name, finding)
            if finding.op not in _UNMEASURED:
                _widen(ops, finding)


_UNMEASURED = ("attention_mask", "greedy")
"""Compared exactly, or by the limits of another op."""


def _widen(ops: dict[str, list[float]], finding: Finding) -> None:
    limits = ops.setdefault(finding.op, [0.0, 0.0])
    limits[0], limits[1] = max(limits[0], finding.aggregate), max(limits[1], finding.worst)


def calibrate(path: Path = noise.CALIBRATION) -> Iterator[str]:
    """Carry out the plan and write the file; yields a line per run."""
    maxima: Maxima = {}
    runs = list(plan())
    for number, run in enumerate(runs, start=1):
        report = carry_out(run)
        widen(maxima, run.dtype, report)
        rung, worst = max(
            ((rung.name, finding) for rung in report.rungs for finding in rung.findings), key=lambda item: item[1].noise
        )
        place = f"{worst.noise:.2f} {rung} {worst.tap} {worst.where}"
        yield f"{number}/{len(runs)}  {run.model:<32} {run.dtype:<9} seed {run.seed} jit={run.jit}  largest {place}"
    path.write_text(json.dumps(_document(maxima, runs), indent=1, sort_keys=True) + "\n")


def _document(maxima: Maxima, runs: list[Run]) -> dict[str, Any]:
    rounded = {
        rung: {dtype: {op: [_up(value) for value in limits] for op, limits in ops.items()} for dtype, ops in by.items()}
        for rung, by in maxima.items()
    }
    return {
        "version": 1,
        "factor": FACTOR,
        "environment": {**environment.versions(), "python": platform.python_version(), "machine": platform.machine()},
        "runs": [f"{run.model} {run.dtype} seed={run.seed} jit={run.jit}" for run in runs],
        "models": models.MODELS | models.WIDE,
        "maxima": rounded,
    }


def _up(value: float) -> float:
    return float(f"{value:.4g}")
