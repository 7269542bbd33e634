"""Clean runs: true models compared with themselves, in many kinds, whatever the limits.

The limits come from them (`oracle.calibrate`), and runs with other seeds show that
clean models never alarm.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from oracle import ladder, models, weight_kinds
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.reference import DTYPES, Reference
from oracle.results import Finding, Report
from oracle.rungs import bits, environment, forward, golden, ids, operators, optimizer, statistics

EXACT = (environment.NAME, ids.NAME, bits.NAME, statistics.NAME, golden.NAME)
"""Rungs that decide without measured limits of their own."""
RUNGS = tuple(name for name in ladder.LADDER if name not in EXACT)
"""Every other rung of the ladder."""
WITHOUT_JIT = (operators.NAME, forward.NAME)
"""Rungs that can be afforded op by op."""

Record = dict[str, Any]
"""What is kept of a run: JSON values."""

CONFIGS = models.MODELS | models.WIDE
OPTIMIZED = 2
"""Seeds of each kind in which a calibration measures the optimizer, which is compiled anew for most models."""
SEEDS = {"random": 5, "trained": 3, "loud": 2, "quiet": 2, "outlier": 3}
"""How many of each kind a full plan has for each tiny model and dtype."""
LONG = ("gpt2-long", "llama3-long")
LONG_KINDS = ("random", "trained")
WIDE_KINDS = ("random", "outlier")
"""One seed each: such runs take ten times as long."""
QUICK = ("gpt2", "llama", "llama-square-biased-tied-linear")
"""Models of a quick plan: every op of both families."""


@dataclass(frozen=True)
class Run:
    """One clean run."""

    model: str
    """A key of `CONFIGS`."""
    kind: str
    """A key of `weight_kinds.KINDS`."""
    dtype: str
    seed: int
    """Of weights and inputs."""
    jit: bool = True

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.model} {self.kind} {self.dtype} seed={self.seed}{'' if self.jit else ' without jit'}"


def full_plan() -> list[Run]:
    """Every model in every dtype, kinds of weights and seeds; two of them op by op as well."""
    tiny = [name for name in models.MODELS if name not in LONG]
    runs = [
        Run(model, kind, dtype, seed)
        for model in tiny
        for dtype in DTYPES
        for kind, seeds in SEEDS.items()
        for seed in range(seeds)
    ]
    runs += [Run(model, kind, dtype, 0) for model in LONG for dtype in DTYPES for kind in LONG_KINDS]
    runs += [Run(model, kind, dtype, 0) for model in models.WIDE for dtype in DTYPES for kind in WIDE_KINDS]
    runs += [
        Run(model, kind, dtype, 0, jit=False)
        for model in ("gpt2", "llama")
        for dtype in DTYPES
        for kind in ("random", "trained", "outlier")
    ]
    return runs


def quick_plan() -> list[Run]:
    """Every op of both families, in every dtype and kind of weights, once."""
    return [Run(model, kind, dtype, 0) for model in QUICK for dtype in DTYPES for kind in weight_kinds.KINDS]


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that share what is slow to make, compilations and trained weights; groups that take long are first."""
    by_model: dict[str, list[Run]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    shared = [sorted(group, key=lambda run: (run.jit, run.dtype)) for group in by_model.values()]
    return sorted(shared, key=_cost, reverse=True)


def _cost(group: Sequence[Run]) -> int:
    config = CONFIGS[group[0].model]
    return len(group) * (config.get("n_layer") or config["num_hidden_layers"])


def carry_out(run: Run, calibration: Calibration | None = None, rungs: Sequence[str] = RUNGS) -> Report:
    """One clean comparison, by default without limits."""
    with TemporaryDirectory() as place:
        folder = models.write(CONFIGS[run.model], Path(place), run.dtype, run.seed, run.kind)
        reference = Reference.load(folder, run.dtype)
        candidate = models.candidate(folder, run.dtype)
        limits = calibration or ladder.uncalibrated()
        comparison = Comparison(candidate, reference, folder, folder, limits, run.seed)
        chosen = [name for name in rungs if run.jit or name in WITHOUT_JIT]
        with jax.disable_jit(not run.jit):
            return ladder.climb(comparison, everything=True, rungs=chosen)


# -- What is kept ----------------------------------------------------------------------


class NotClean(Exception):
    """A true model differs where no limit is needed to tell: the oracle or the product is broken."""


def measured(run: Run) -> Record:
    """Carry out a run; per rung and op the largest ratios, and the relative error that one noise unit is.

    Raises:
        NotClean: a shape, a mask or a boolean differs, or a number is not finite.
    """
    start = time.perf_counter()
    report = carry_out(run, rungs=[name for name in RUNGS if run.seed < OPTIMIZED or name != optimizer.NAME])
    kept: dict[str, dict[str, list[float]]] = {}
    largest = 0.0, ""
    for rung in report.rungs:
        for finding in rung.findings:
            place = f"{rung.name} {finding.tap} {finding.where}".strip()
            if not finding.ok or not math.isfinite(finding.noise):
                raise NotClean(f"{run.name}: {place} {finding.problem}")
            if _is_measured(finding):
                _widen(kept.setdefault(rung.name, {}).setdefault(finding.op, [0.0, 0.0, 0.0]), finding)
                largest = max(largest, (finding.noise, place))
    return {
        "run": run.name,
        "dtype": run.dtype,
        "seconds": round(time.perf_counter() - start, 2),
        "largest": f"{largest[0]:.2f} {largest[1]}",
        "ratios": kept,
    }


def _is_measured(finding: Finding) -> bool:
    """Exact comparisons, and those by the limits of another op, have no limits of their own."""
    return finding.threshold != (0.0, 0.0)


def _widen(kept: list[float], finding: Finding) -> None:
    # KL is the square of an error, in nats: a unit of it is no relative error.
    has_unit = finding.aggregate > 0 and finding.op != "kl"
    unit = finding.error / finding.aggregate if has_unit else 0.0
    for index, value in enumerate((finding.aggregate, finding.worst, unit)):
        kept[index] = max(kept[index], value)
