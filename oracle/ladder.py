"""The ladder: rungs in causal order, stopping at the first that breaks."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax

from oracle import exposure, noise, threads, training_site
from oracle.candidate import Unrunnable
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.results import Finding, Inconclusive, Report, RungResult
from oracle.rungs import (
    bits,
    decode,
    decode_site,
    environment,
    forward,
    golden,
    gradients,
    ids,
    loss,
    operators,
    optimizer,
    statistics,
)
from oracle.site import Site

Rung = Callable[[Comparison], RungResult]

LADDER: dict[str, Rung] = {
    environment.NAME: lambda c: environment.run(c.candidate, c.reference, c.sequences(), c.calibration),
    ids.NAME: ids.run,
    bits.NAME: lambda c: bits.run(c.candidate, c.export, c.source),
    statistics.NAME: statistics.run,
    operators.NAME: lambda c: operators.run(
        c.candidate, c.reference, c.sequences(), c.judge(operators.NAME), c.measured
    ),
    forward.NAME: forward.run,
    loss.NAME: loss.run,
    gradients.NAME: gradients.run,
    optimizer.NAME: optimizer.run,
    decode.NAME: lambda c: decode.run(c.candidate, c.reference, c.decoding(), c.judge(decode.NAME)),
    golden.NAME: golden.run,
}
"""In causal order; the last is climbed by checkpoints that have golden prompts."""


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
    with jax.default_matmul_precision("highest"), threads.fitting(comparison.candidate.config):
        for name in (name for name in LADDER if name in rungs and (name != golden.NAME or comparison.golden)):
            progress(name)
            results.append(_timed(name, comparison))
            if results[-1].verdict == "inconclusive" or (results[-1].verdict == "fail" and not everything):
                break
        versions = environment.versions()
    climbed = [result.name for result in results]
    differs = any(not found.ok and found.where == "export" for result in results for found in result.findings)
    exposed, hidden = exposure.classes(comparison, climbed, export_differs=differs)
    config, dtype = comparison.candidate.config.to_dict(), comparison.candidate.dtype
    setting = {**versions, "dtype": dtype, "config": config, "seed": comparison.seed}
    setting["calibrated_with"] = dict(comparison.calibration.environment)
    return Report(results, exposed, hidden, setting, beyond=exposure.beyond(comparison, climbed))


def _timed(name: str, comparison: Comparison) -> RungResult:
    start = time.perf_counter()
    try:
        result = run_rung(name, comparison)
    except Inconclusive as reason:
        result = RungResult(name, [], str(reason), inconclusive=str(reason))
    return replace(result, seconds=time.perf_counter() - start)


def run_rung(name: str, comparison: Comparison) -> RungResult:
    """One rung; a candidate that cannot run it fails it."""
    try:
        return LADDER[name](comparison)
    except Unrunnable as reason:
        return RungResult(name, [Finding("", "", ok=False, problem=str(reason))], str(reason))


SITES: dict[str, Callable[[Comparison, Finding], Site]] = {
    ids.NAME: ids.site,
    bits.NAME: bits.site,
    statistics.NAME: statistics.site,
    operators.NAME: operators.site,
    forward.NAME: forward.site,
    **{rung: training_site.of(rung) for rung in (loss.NAME, gradients.NAME, optimizer.NAME)},
    decode.NAME: decode_site.site,
}
"""Rungs that can measure one of their findings alone; the others are run again as a whole."""


def site(comparison: Comparison, rung: str, finding: Finding) -> Site:
    """Where a finding can be measured again with a changed candidate."""
    make = SITES.get(rung)
    return make(comparison, finding) if make and finding.tap else Site(comparison, rung, finding)


def sites(comparison: Comparison, rung: str, findings: Sequence[Finding]) -> Iterator[Site]:
    """`site` of several findings in execution order; ops and taps share one forward of the reference."""
    if rung == operators.NAME:
        yield from operators.sites(comparison, findings)
    elif rung == forward.NAME:
        yield from forward.sites(comparison, findings)
    else:
        yield from (site(comparison, rung, finding) for finding in findings)


def uncalibrated(factor: float = 1.0) -> Calibration:
    """Limits that nothing exceeds: for the clean runs from which the real limits come."""
    return _Unlimited(factor, {}, {})


class _Unlimited(noise.Calibration):
    def threshold(self, rung: str, dtype: str, op: str) -> tuple[float, float]:
        return float("inf"), float("inf")
