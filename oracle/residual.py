"""What a difference looks like: which positions, heads and dimensions, and of what kind.

A cause that no repair undoes is reported as unknown, with this: often enough for a
person to know ("only at positions 512 and later", "0.25 times the truth").
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oracle import compare
from oracle.results import Residual

BINS = 64
"""A longer axis is shown in so many bins."""
CARRIES = 0.99
"""Share of the squared error that the indices named by a sentence hold."""
CLEAN = (0.1, 0.02)
"""Any other index is right if its relative error is less than this part of theirs, and less than this."""
ALIKE = 0.5
"""Relative errors that differ by less are the same everywhere: more error where there is more to be wrong."""
HEAD_TAPS = (*compare.HEADS_FIRST, *compare.CACHED)


def axis_names(tap: str, ndim: int) -> tuple[str, ...]:
    """What the axes of a tap, or of a parameter, are called."""
    if tap.endswith(("kernel", "weight", "bias")):
        matrix = ("id", "dimension") if "embed" in tap or tap.startswith("head") else ("input", "output")
        return matrix if ndim == 2 else ("dimension",)
    if tap.endswith(compare.QUERY_BY_SOURCE):
        return "row", "head", "position", "source"
    if tap.endswith(HEAD_TAPS):
        return "row", "head", "position", "dimension"
    return ("row", "position", "dimension")[:ndim] if ndim <= 3 else tuple(f"axis {i}" for i in range(ndim))


def describe(tap: str, candidate: np.ndarray, truth: np.ndarray) -> Residual | None:
    """The structure of candidate − truth, arrays of equal shape; None where there is no such thing."""
    if candidate.shape != truth.shape or not candidate.size or not candidate.ndim:
        return None
    ours, true = candidate.astype(np.float64), truth.astype(np.float64)
    hidden = (true <= compare.HIDDEN) & (ours <= compare.HIDDEN)
    if hidden.any():
        ours, true = np.where(hidden, 0.0, ours), np.where(hidden, 0.0, true)
    finite = np.isfinite(ours) & np.isfinite(true)
    a, b = (array.ravel() if finite.all() else array[finite] for array in (ours, true))
    if not finite.all():
        ours, true = np.where(finite, ours, 0.0), np.where(finite, true, 0.0)
    names, error = axis_names(tap, ours.ndim), ours - true
    energies, truths = _energies(error, names), _energies(true, names)
    lost = {name: np.zeros(0, int) if finite.all() else _lost(finite, axis) for axis, name in enumerate(names)}
    scale, correlation = _scale(a, b), _correlation(a, b)
    places = [_place(name, energies[name], truths[name], lost[name]) for name in names]
    sentences = [*_not_finite(finite), *filter(None, places), *_kind(a, b, scale, correlation)]
    sentences += _largest(names, ours, true)
    profiles = {name: _binned(energy / (error.size / energy.size)) for name, energy in energies.items()}
    return Residual(tuple(ours.shape), profiles, scale, correlation, sentences)


def _energies(error: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    squares, axes = np.square(error), range(error.ndim)
    return {name: squares.sum(axis=tuple(i for i in axes if i != axis)) for axis, name in enumerate(names)}


def _lost(finite: np.ndarray, axis: int) -> np.ndarray:
    """Indices at which some value is NaN or infinite."""
    return np.flatnonzero(~finite.all(axis=tuple(i for i in range(finite.ndim) if i != axis)))


def _binned(mean_squares: np.ndarray) -> list[float]:
    parts = np.array_split(mean_squares, min(BINS, len(mean_squares)))
    return [float(part.mean() ** 0.5) for part in parts]


def _scale(ours: np.ndarray, true: np.ndarray) -> float:
    norm = float(np.square(true).sum())
    return float((ours * true).sum()) / norm if norm else 0.0


def _correlation(ours: np.ndarray, true: np.ndarray) -> float:
    if ours.size < 2:
        return 0.0
    a, b = ours - ours.mean(), true - true.mean()
    norm = float(np.square(a).sum() * np.square(b).sum()) ** 0.5
    return float((a * b).sum()) / norm if norm else 0.0


# -- In words --------------------------------------------------------------------------


def _not_finite(finite: np.ndarray) -> Iterator[str]:
    if not finite.all():
        yield f"{int((~finite).sum()):,} of {finite.size:,} values are NaN or infinite"


def _place(name: str, energy: np.ndarray, truth: np.ndarray, lost: np.ndarray) -> str:
    """Few indices of an axis that hold all of the error, or nearly all; nothing where it is all over."""
    total, few = float(energy.sum()), max(1, len(energy) // 2)
    order = np.argsort(energy)[::-1]
    most = order[: int(np.searchsorted(np.cumsum(energy[order]), CARRIES * total)) + 1] if total else order[:0]
    theirs = _relative(energy[most].sum(), truth[most].sum(), truth.mean() * len(most))
    each = _relative(energy, truth, truth.mean())
    wrong = np.union1d(np.flatnonzero(each > min(CLEAN[0] * theirs, CLEAN[1])) if total else [], lost).astype(int)
    if len(energy) < 2 or not (total or len(lost)):
        return ""
    if len(wrong) <= few and energy[wrong].sum() >= CARRIES * total:
        return f"only in {_indices(name, wrong.tolist())} of {len(energy):,}"
    rest = np.setdiff1d(order, most)
    others = _relative(energy[rest].sum(), truth[rest].sum(), truth.mean() * len(rest))
    if len(lost) or len(most) > few or others > ALIKE * theirs:
        return ""
    return f"mostly in {_indices(name, sorted(most.tolist()))} of {len(energy):,}"


def _relative(energy: Any, truth: Any, typical: float) -> Any:
    """Roots of shares of the truth's squares; where the truth is zero, of what is `typical` of them."""
    return (energy / np.where(truth > 0, truth, typical or 1.0)) ** 0.5


def _indices(name: str, indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"{name} {indices[0]}"
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return f"{name}s {first}–{last}"
    steps = set(np.diff(indices).tolist())
    if len(indices) == 2:
        return f"{name}s {first} and {last}"
    if len(steps) == 1:
        step = steps.pop()
        return f"every {step}{_ORDINAL.get(step, 'th')} {name} from {first} to {last}"
    shown = ", ".join(map(str, indices[:4]))
    return f"{len(indices):,} {name}s ({shown}{', …' if len(indices) > 4 else ''})"


_ORDINAL = {2: "nd", 3: "rd"}


def _largest(names: Sequence[str], ours: np.ndarray, true: np.ndarray) -> Iterator[str]:
    """Two numbers that a person can look at."""
    error = np.abs(ours - true)
    at = np.unravel_index(int(error.argmax()), error.shape)
    if error[at]:
        place = ", ".join(f"{name} {index}" for name, index in zip(names, at, strict=True))
        yield f"most at {place}: {ours[at]:.6g}, the reference has {true[at]:.6g}"


def _kind(a: np.ndarray, b: np.ndarray, scale: float, correlation: float) -> Iterator[str]:
    """Is it a multiple, an offset, unrelated, or small everywhere?"""
    error = float(np.square(a - b).sum()) ** 0.5
    norm = float(np.square(b).sum()) ** 0.5
    if not error or not norm:
        return
    if not np.any(a):
        yield "the candidate is zero everywhere"
    elif float(np.square(a - scale * b).sum()) ** 0.5 < 0.02 * error:
        yield f"the candidate is {scale:.6g} times the truth"
    elif float(np.square(a - b - (a - b).mean()).sum()) ** 0.5 < 0.02 * error:
        yield f"the candidate is the truth plus {float((a - b).mean()):.6g}"
    elif _same_values(a, b):
        yield "the same values in another order"
    elif abs(correlation) < 0.1:
        yield f"unrelated to the truth (correlation {correlation:.6f})"
    else:
        yield f"relative error {error / norm:.2g}, correlation {correlation:.6f}"


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """In another order, by sums that no order changes; sorting tens of millions takes longer than all the rest."""
    sums = ((float(x.sum()), float(np.abs(x).sum()), float(np.square(x).sum())) for x in (a, b))
    return bool(np.allclose(*sums, rtol=0, atol=1e-6 * float(np.abs(b).sum()) / len(b) ** 0.5))
