"""How large a difference of gradients or of updates is, in multiples of noise that does not vanish with the tensor.

Some gradients are zero by the model's mathematics (GPT-2's key bias adds the same to
all scores of a query) and some are nearly so; what rounding leaves in them is
of the size of the layer's other gradients, not of their own. So the floor of the
noise is one ulp at the layer's scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oracle import noise
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
    return _Size().add(array).rms


@dataclass
class _Size:
    """Of an array given in pieces."""

    squares: float = 0.0
    count: int = 0
    peak: float = 0.0

    def add(self, array: np.ndarray) -> "_Size":
        for piece in _pieces(array):
            wide = np.abs(piece.astype(np.float64))
            self.squares += float(np.square(wide).sum())
            self.count += wide.size
            self.peak = max(self.peak, float(wide.max(initial=0.0)))
        return self

    @property
    def rms(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of so many elements: a large matrix is not held in float64 as a whole."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, noise.CHUNK):
        yield flat[start : start + noise.CHUNK]


def measure(candidate: np.ndarray, truth: np.ndarray, peer: np.ndarray, unit: Unit) -> Ratios:
    """Candidate against truth in multiples of the peer's error: root mean square, and worst element.

    `error` is relative to the truth, or to `unit.scale` where the truth is smaller.
    """
    if candidate.shape != truth.shape:
        return _problem(f"shape {list(candidate.shape)}, the reference has {list(truth.shape)}")
    true, ours, theirs = _Size(), _Size(), _Size()
    for side, array in (("candidate", candidate), ("reference in float64", truth), ("reference", peer)):
        if not all(np.isfinite(piece).all() for piece in _pieces(array)):
            return _problem(f"the {side} has NaN or infinite values")
    for a, b, c in zip(_pieces(candidate), _pieces(truth), _pieces(peer), strict=True):
        wide = b.astype(np.float64)
        true.add(wide)
        ours.add(a.astype(np.float64) - wide)
        theirs.add(c.astype(np.float64) - wide)
    size, peak = max(true.rms, unit.scale), max(true.peak, unit.scale)
    return Ratios(
        error=_quotient(ours.rms, size),
        aggregate=_quotient(ours.rms, max(theirs.rms, unit.noise, unit.epsilon * size)),
        worst=_quotient(ours.peak, max(theirs.peak, unit.noise, unit.epsilon * peak)),
    )


def _quotient(value: float, by: float) -> float:
    return value / by if by else (0.0 if value == 0.0 else float("inf"))


def _problem(problem: str) -> Ratios:
    return Ratios(float("inf"), float("inf"), float("inf"), problem)
