"""How large a difference of gradients or of updates is, in multiples of noise that does not vanish with the tensor.

Some gradients are zero by the model's mathematics (GPT-2's key bias adds the same to
all scores of a query) and some are nearly so; what rounding leaves in them is
of the size of the layer's other gradients, not of their own. So the floor of the
noise is one ulp at the layer's scale.
"""

from dataclasses import dataclass

import numpy as np

from oracle.noise import Ratios


@dataclass(frozen=True)
class Unit:
    """What a difference is measured by."""

    epsilon: float
    """One ulp at 1."""
    scale: float = 0.0
    """Root mean square, in the tensor's unit, at which rounding happens if the tensor itself is smaller."""
    noise: float = 0.0
    """Root mean square that the peer's error is taken to have at least."""


def rms(array: np.ndarray) -> float:
    """Root mean square; 0 of nothing."""
    return float(np.sqrt(np.square(array).mean())) if array.size else 0.0


def measure(candidate: np.ndarray, truth: np.ndarray, peer: np.ndarray, unit: Unit) -> Ratios:
    """Candidate against truth in multiples of the peer's error: root mean square, and worst element.

    `error` is relative to the truth, or to `unit.scale` where the truth is smaller.
    """
    if candidate.shape != truth.shape:
        return _problem(f"shape {list(candidate.shape)}, the reference has {list(truth.shape)}")
    ours, true, theirs = (array.astype(np.float64) for array in (candidate, truth, peer))
    for side, array in (("candidate", ours), ("reference in float64", true), ("reference", theirs)):
        if not np.isfinite(array).all():
            return _problem(f"the {side} has NaN or infinite values")
    ours, theirs = np.abs(ours - true), np.abs(theirs - true)
    size, peak = max(rms(true), unit.scale), max(_peak(true), unit.scale)
    return Ratios(
        error=_quotient(rms(ours), size),
        aggregate=_quotient(rms(ours), max(rms(theirs), unit.noise, unit.epsilon * size)),
        worst=_quotient(_peak(ours), max(_peak(theirs), unit.noise, unit.epsilon * peak)),
    )


def _peak(array: np.ndarray) -> float:
    return float(np.abs(array).max()) if array.size else 0.0


def _quotient(value: float, by: float) -> float:
    return value / by if by else (0.0 if value == 0.0 else float("inf"))


def _problem(problem: str) -> Ratios:
    return Ratios(float("inf"), float("inf"), float("inf"), problem)
