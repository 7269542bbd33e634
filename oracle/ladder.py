"""The ladder: rungs in causal order, stopping at the first that breaks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from oracle import exposure, noise, probe
from oracle.candidate import Candidate, Unrunnable
from oracle.compare import Judge
from oracle.noise import Calibration
from oracle.reference import Reference
from oracle.results import Finding, Inconclusive, Report, RungResult
from oracle.rungs import bits, decode, environment, forward, operators


@dataclass(frozen=True)
class Comparison:
    """Everything a rung may look at."""

    candidate: Candidate
    reference: Reference
    export: Path
    """The candidate as the product's exporter writes it."""
    source: Path | None
    """The Hugging Face folder the weights came from, if it is known."""
    calibration: Calibration
    seed: int = 0

    @property
    def real_ids(self) -> int:
        """Ids that mean something."""
        return self.candidate.real_ids or self.candidate.config.vocab_size

    def judge(self, rung: str) -> Judge:
        """Limits of one rung."""
        return Judge(rung, self.candidate.dtype, self.calibration)

    def sequences(self) -> probe.Probe:
        """Whole sequences to run both models on."""
        return probe.sequences(self.candidate.config, self.real_ids, self.seed)

    def decoding(self) -> probe.DecodeProbe:
        """Prompts and forced ids."""
        return probe.decoding(self.candidate.config, self.real_ids, self.seed + 1)


Rung = Callable[[Comparison], RungResult]

LADDER: dict[str, Rung] = {
    environment.NAME: lambda c: environment.run(c.candidate, c.reference, c.sequences()),
    bits.NAME: lambda c: bits.run(c.candidate, c.export, c.source),
    operators.NAME: lambda c: operators.run(c.candidate, c.reference, c.sequences(), c.judge(operators.NAME)),
    forward.NAME: lambda c: forward.run(c.candidate, c.reference, c.sequences(), c.judge(forward.NAME)),
    decode.NAME: lambda c: decode.run(c.candidate, c.reference, c.decoding(), c.judge(decode.NAME)),
}
"""In causal order."""


def climb(
    comparison: Comparison,
    *,
    everything: bool = False,
    rungs: Sequence[str] = tuple(LADDER),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run the rungs in order.

    Args:
        everything: go on after a rung that failed.
        rungs: which of `LADDER` to run.
        progress: told the name of each rung before it runs.
    """
    results: list[RungResult] = []
    with jax.default_matmul_precision("highest"):
        for name in (name for name in LADDER if name in rungs):
            progress(name)
            results.append(_timed(name, comparison))
            if results[-1].verdict == "inconclusive" or (results[-1].verdict == "fail" and not everything):
                break
        versions = environment.versions()
    exposed, hidden = exposure.classes(comparison, [result.name for result in results])
    config, dtype = comparison.candidate.config.to_dict(), comparison.candidate.dtype
    setting = {**versions, "dtype": dtype, "config": config, "seed": comparison.seed}
    setting["calibrated_with"] = dict(comparison.calibration.environment)
    return Report(results, exposed, hidden, setting)


def _timed(name: str, comparison: Comparison) -> RungResult:
    start = time.perf_counter()
    try:
        result = LADDER[name](comparison)
    except Unrunnable as reason:
        result = RungResult(name, [Finding("", "", ok=False, problem=str(reason))], str(reason))
    except Inconclusive as reason:
        result = RungResult(name, [], str(reason), inconclusive=str(reason))
    return replace(result, seconds=time.perf_counter() - start)


def uncalibrated(factor: float = 1.0) -> Calibration:
    """Limits that nothing exceeds: for the clean runs from which the real limits come."""
    return _Unlimited(factor, {}, {})


class _Unlimited(noise.Calibration):
    def threshold(self, rung: str, dtype: str, op: str) -> tuple[float, float]:
        return float("inf"), float("inf")
