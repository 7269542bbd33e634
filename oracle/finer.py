"""A second look in float32, where bfloat16's rounding hides what a later rung shows.

Parameters are optimized in float32 whatever the model computes in, and gradients add up
many small differences. So a fault of an op or of the loss that is smaller than the
rounding of bfloat16 may first show there; in float32 it is found where it begins.
"""

from collections.abc import Callable
from dataclasses import replace

from oracle import ladder, training_probe
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.results import RungResult
from oracle.rungs import forward, gradients, loss, operators, optimizer

DTYPE = "float32"
RUNGS = (operators.NAME, forward.NAME, loss.NAME, gradients.NAME, optimizer.NAME)
LATE = (gradients.NAME, optimizer.NAME)
"""Rungs in which a difference may show that began before."""


def hides(dtype: str) -> bool:
    """Rounding in a dtype hides what would show in float32."""
    return dtype != DTYPE


def look(
    comparison: Comparison, broken: RungResult, progress: Callable[[str], None]
) -> tuple[Comparison, RungResult] | None:
    """The comparison in float32 and the rung before `broken` that fails in it, if there is one.

    Not for a large model, of which a further reference would be too much.
    """
    place = comparison.source or comparison.export
    large = training_probe.is_large(comparison.candidate.config)
    if broken.name not in LATE or not hides(comparison.candidate.dtype) or place is None or large:
        return None
    candidate = replace(comparison.candidate, dtype=DTYPE)
    reference = Reference.load(place, DTYPE)
    fine = replace(comparison, candidate=candidate, reference=reference, export=None, measured={})
    before = RUNGS[: RUNGS.index(broken.name)]
    found = ladder.climb(fine, rungs=before, progress=progress).broken
    return (fine, found) if found else None
