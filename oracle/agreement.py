"""How closely true models agree in float32: the largest error of all comparisons, beside what it must not exceed."""

from collections.abc import Iterator, Sequence

from oracle.faults.figures import Figure
from oracle.reports.outcome import Outcome
from oracle.results import RungResult
from oracle.rungs import decode, forward, gradients, optimizer

TARGETS = {forward.MAX_KL: 1e-8, gradients.LARGEST: 1e-5, optimizer.UPDATE: 1e-4}
DTYPES = ("float32", "bfloat16")
STEPS, PROMPTS = 256, 32
"""Greedy tokens to be compared in one model."""


def figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Of the models that were compared as they are; a dtype that is missing has no figures."""
    true = [outcome for outcome in outcomes if not outcome.planted]
    found = list(_errors([rung for outcome in _in("float32", true) for rung in outcome.report.rungs]))
    for dtype in DTYPES:
        found += _greedy(dtype, [rung for outcome in _in(dtype, true) for rung in outcome.report.rungs])
    return found


def _in(dtype: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.report.environment.get("dtype") == dtype]


def _errors(rungs: Sequence[RungResult]) -> Iterator[Figure]:
    for name, target in TARGETS.items():
        values = [rung.figures[name] for rung in rungs if name in rung.figures]
        if values:
            yield Figure(f"float32: {name}", max(values), len(values), target, at_most=True, is_share=False)


def _greedy(dtype: str, rungs: Sequence[RungResult]) -> Iterator[Figure]:
    counts = [rung.figures for rung in rungs if decode.GREEDY in rung.figures]
    if counts:
        total = int(sum(count[decode.GREEDY] for count in counts))
        right = sum(count[decode.EXACT] + count[decode.TIES] for count in counts)
        yield Figure(f"{dtype}: greedy tokens exact or certified ties", right / total, total, 1.0)
        most = max(count[decode.GREEDY] for count in counts)
        yield Figure(f"{dtype}: greedy tokens of one model", most, len(counts), STEPS * PROMPTS, is_share=False)
