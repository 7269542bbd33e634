"""How large a difference of gradients or of updates is, in multiples of noise that does not vanish with the tensor.

Some gradients are zero by the model's mathematics (GPT-2's key bias adds the same to
all scores of a query) and some are nearly so; what rounding leaves in them is
of the size of the layer's other gradients, not of their own. So the floor of the
noise is one ulp at the layer's scale.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
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
    peak: float = 0.0
    """Largest element that it is taken to have at least."""


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
            wide = piece.astype(np.float64, copy=False)
            self.squares += noise.squares(wide)
            self.count += wide.size
            self.peak = max(self.peak, float(wide.max(initial=0.0)), -float(wide.min(initial=0.0)))
        return self

    @property
    def rms(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of so many elements: a large matrix is not held in float64 as a whole."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, noise.CHUNK):
        yield flat[start : start + noise.CHUNK]


def measure(
    candidate: np.ndarray, truth: np.ndarray, peer: np.ndarray, unit: Unit, echoes: Sequence[np.ndarray] = ()
) -> Ratios:
    """Candidate against truth in multiples of the peer's error: root mean square, and worst element.

    `error` is relative to the truth, or to `unit.scale` where the truth is smaller. With
    echoes (`oracle.echo`) the largest of the peer's and their errors counts, or what their
    scatter makes likely (`_reach`).
    """
    if candidate.shape != truth.shape:
        return _problem(f"shape {list(candidate.shape)}, the reference has {list(truth.shape)}")
    peers = [peer, *echoes]
    if problems := noise.not_finite(candidate, truth, peers):
        return _problem(problems[0])
    true, ours, *theirs = (_difference(array, truth) for array in (None, candidate, *peers))
    rms, largest = _reach([error.rms for error in theirs]), _reach([error.peak for error in theirs])
    size, peak = max(true.rms, unit.scale), max(true.peak, unit.scale)
    return Ratios(
        error=_quotient(ours.rms, size),
        aggregate=_quotient(ours.rms, max(rms, unit.noise, unit.epsilon * size)),
        worst=_quotient(ours.peak, max(largest, unit.noise, unit.peak, unit.epsilon * peak)),
    )


MANY = 8
"""Draws that tell how far they scatter: the peer and `echo.ALL`."""
SCATTER = 4.0
"""Standard deviations of the logarithm up to which an error is one more draw."""
ALLOWED = 4.0
"""Limits are so many times what clean runs reached."""


def _reach(draws: Sequence[float]) -> float:
    """The unit that draws of an error give: the largest, or more where they differ by decades.

    In a deep bfloat16 model with outliers one norm of one token may decide a gradient, and the largest of
    eight draws says little of the ninth. Their logarithms are about normal: in float32 with a standard
    deviation of 0.15, in bfloat16 of 0.4, there of 0.9 and more. What is within `SCATTER` of those must be
    within the limits, which alone allow what 0.55 and less need.
    """
    largest = max(draws)
    if len(draws) < MANY or not min(draws):
        return largest
    logs = [math.log(draw) for draw in draws]
    likely = math.exp(statistics.mean(logs) + SCATTER * statistics.stdev(logs))
    return max(largest, likely / ALLOWED)


def _difference(array: np.ndarray | None, truth: np.ndarray) -> _Size:
    """Of an array from the truth; without an array, of the truth from nothing."""
    found = _Size()
    for index, true in enumerate(_pieces(truth)):
        start = index * noise.CHUNK
        piece = None if array is None else array.reshape(-1)[start : start + noise.CHUNK]
        found.add(true if piece is None else np.subtract(piece, true, dtype=np.float64))
    return found


def _quotient(value: float, by: float) -> float:
    return value / by if by else (0.0 if value == 0.0 else float("inf"))


def _problem(problem: str) -> Ratios:
    return Ratios(float("inf"), float("inf"), float("inf"), problem)
