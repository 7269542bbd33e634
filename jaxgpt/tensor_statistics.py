"""Mean, spread and range of every parameter, and whether its kind can look like that.

The bounds are wide enough for real models (Qwen2's norm weights span −2.28 to 17.38,
its query biases −65.5 to 128) and narrow enough for bits read in the wrong dtype.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

EMBEDDING_STD = (0.005, 0.5)
NORM_WEIGHT = (0.01, 100.0)
"""Of the mean magnitude; the largest magnitude stays below the upper bound as well."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorStatistics:
    """One parameter; the numbers are those of its finite values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    min: float
    max: float
    first: tuple[float, ...]
    """Its first elements, in row order."""
    alarm: str
    """Why it cannot be right; empty where nothing speaks against it."""


def tensor_statistics(params: Mapping[str, Any], shown: int = 4) -> list[TensorStatistics]:
    """Statistics of every parameter, with its `shown` first elements."""
    return [_statistics(name, np.asarray(array), shown) for name, array in params.items()]


def _statistics(name: str, array: np.ndarray, shown: int) -> TensorStatistics:
    total = magnitude = squares = 0.0
    low, high, finite = np.inf, -np.inf, 0
    for part in _finite_parts(array):
        finite += part.size
        total += float(part.sum())
        magnitude += float(np.abs(part).sum())
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    mean, magnitude = (total / finite, magnitude / finite) if finite else (0.0, 0.0)
    for part in _finite_parts(array):
        squares += float(np.square(part - mean).sum())
    std = (squares / finite) ** 0.5 if finite else 0.0
    low, high = (low, high) if finite else (0.0, 0.0)
    return TensorStatistics(
        name=name,
        shape=array.shape,
        dtype=str(array.dtype),
        mean=mean,
        std=std,
        min=low,
        max=high,
        first=tuple(float(value) for value in array.flat[:shown]),
        alarm=_alarm(name, std, magnitude, max(-low, high), array.size - finite),
    )


def _finite_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The finite values in float64, a part at a time: an embedding is large."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        part = part[np.isfinite(part)]
        if part.size:
            yield part


def _alarm(name: str, std: float, magnitude: float, largest: float, not_finite: int) -> str:
    if not_finite:
        return f"{not_finite:,} values are NaN or infinity"
    if name.startswith("embed.") and not EMBEDDING_STD[0] <= std <= EMBEDDING_STD[1]:
        return f"std {std:.3g} of an embedding; expected {EMBEDDING_STD[0]}–{EMBEDDING_STD[1]}"
    low, high = NORM_WEIGHT
    if name.endswith("norm.weight") and (magnitude < low or largest > high):
        return f"magnitude {magnitude:.3g}, at most {largest:.3g}, of norm weights; expected {low}–{high:.0f}"
    if name.endswith(".kernel") and std == 0.0:
        return "every value is the same"
    return ""
