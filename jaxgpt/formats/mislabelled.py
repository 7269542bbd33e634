"""Whether the weights' 16 bits are another format than their file says.

The formats differ by three bits of the exponent. Weights of any usual distribution and
scale spread over one or two powers of two (the standard deviation of log2|x| is 1.4 for
a uniform, 1.6 for a normal one); read in the other format, over an eighth or eight times
as many. Neither holds a NaN.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

_OTHER = {"float16": np.dtype(ml_dtypes.bfloat16), "bfloat16": np.dtype(np.float16)}
_SAMPLE, _FEWEST = 1 << 14, 64
"""Values looked at of each matrix, evenly spread, and how many must not be zero."""
_POWERS_OF_TWO = (0.7, 6.0)
"""Standard deviation of log2|x| in any matrix of weights."""


def mislabelled(params: Mapping[str, np.ndarray]) -> str:
    """One line that says so; empty where most matrices look like weights in their own dtype."""
    matrices = [array for array in params.values() if array.ndim > 1 and str(array.dtype) in _OTHER]
    suspects = [array for array in matrices if _is_another(array)]
    if not suspects or 2 * len(suspects) <= len(matrices):
        return ""
    named, other = str(suspects[0].dtype), _OTHER[str(suspects[0].dtype)]
    sample = _sample(suspects[0])
    return (
        f"{len(suspects)} of {len(matrices)} matrices are marked {named}, but their bits look like {other}: typical "
        f"magnitude {_typical(sample):.2g} as {named}, {_typical(sample.view(other)):.2g} as {other}; "
        "correct the dtype in the file's header"
    )


def _is_another(array: np.ndarray) -> bool:
    sample = _sample(array)
    return not _looks_like_weights(sample) and _looks_like_weights(sample.view(_OTHER[str(array.dtype)]))


def _sample(array: np.ndarray) -> np.ndarray:
    # Whole rows: they are views also of a transposed array, whose reshape would copy all of it.
    rows = array[:: max(1, array.size // _SAMPLE)]
    return np.ascontiguousarray(rows).reshape(-1)[:_SAMPLE]


def _looks_like_weights(values: np.ndarray) -> bool:
    exponents = _log2(values)
    low, high = _POWERS_OF_TWO
    return len(exponents) >= _FEWEST and low < float(exponents.std()) < high


def _typical(values: np.ndarray) -> float:
    return float(2 ** np.median(_log2(values)))


def _log2(values: np.ndarray) -> np.ndarray:
    """Of the values that are neither zero nor infinite nor NaN."""
    wide = np.abs(values.astype(np.float64))
    return np.log2(wide[np.isfinite(wide) & (wide > 0)])
