"""How the values of a wrong tensor resemble the file's: quantised, fine-tuned, merged, or not at all."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from oracle.repairs.weights.differences import Look, epsilon
from oracle.repairs.weights.encodings import BF16, arrangements
from oracle.rungs.bits import ParameterSite, equal, sampled

ROWS = 1 << 19
"""Elements looked at: enough for any statistic, and quick for an embedding."""
FIRST = 1 << 16
"""Elements looked at for the grid of a quantised tensor."""
BLOCKS = (32, 64, 128)
"""Values that share a scale in usual formats."""
CORNER = 192
"""Rows and columns of a difference whose rank is looked at before the whole's."""
ABOVE, WITHIN = 4, 1.3
"""In sizes of the rounding: a difference, and what may be left of it without the matrix of low rank. Of random values
a third of the rank leaves more than half."""
RELATED = 0.5
"""Correlation of a tensor with the same tensor of another revision; of unrelated ones it is about 0."""
ROWS_LEAST = 8
"""Of a table; in fewer rows a difference is not that of a training."""
LEAST = 4
"""So many tensors make a revision; fewer were changed by something else."""
FITS = 3
"""Times that the scale of a quantised tensor is fitted; a first guess is off by one step in a hundred values."""
APART = 0.6
"""Of two fresh draws it is 0.86 or more, of values with a twentieth of noise 0.46 or less (700 to 7,000 of them)."""
CONFIDENT = 5.0
"""Standard deviations within which unrelated values correlate by chance."""


def _first(array: np.ndarray) -> np.ndarray:
    """The first rows, as many as are looked at for a grid."""
    return array[: max(1, FIRST // max(1, array[:1].size))].astype(np.float64)


# -- Rounded ---------------------------------------------------------------------------


def dequantised(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """Rounded to the levels of int8 or int4, with a scale for the tensor, each row or column, or each block."""
    if ours.ndim != 2:
        return None
    tolerance = 1.5 * max(2.0**-11, epsilon(ours))  # values may have been float16 in between
    for name, a, b, low, high in _groups(ours, theirs):
        for levels, grid in _grids(a, b, low, high):
            near = np.abs(a - grid) <= tolerance * np.abs(grid)
            # A step is wide: far fewer of the file's own values are on the grid.
            own = np.abs(b - grid) <= tolerance * np.abs(grid)
            if near.mean() > max(0.75, own.mean() + 0.3):
                words = f"with the file's values, not {levels} levels a {name}"
                return Look("weight dequantised from int8 or int4", words)
    return None


_Group = tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _groups(ours: np.ndarray, theirs: np.ndarray) -> Iterator[_Group]:
    """What may share a scale: its name, ours and theirs as (groups, members), the file's extremes of each group."""
    a, b = (_first(array).reshape(1, -1) for array in (ours, theirs))
    yield "tensor", a, b, np.array([[float(theirs.min())]]), np.array([[float(theirs.max())]])
    for name, a, b in (("row", ours, theirs), ("column", ours.T, theirs.T)):
        a, b = _first(a), _first(b)
        for members in (a.shape[1], *(block for block in BLOCKS if a.shape[1] % block == 0)):
            given, true = a.reshape(-1, members), b.reshape(-1, members)
            what = name if members == a.shape[1] else f"block of {members}"
            yield what, given, true, true.min(axis=1, keepdims=True), true.max(axis=1, keepdims=True)


def _grids(ours: np.ndarray, theirs: np.ndarray, low: np.ndarray, high: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """What each way of quantising makes of the file's values, its scale fitted to ours."""
    peak = np.maximum(-low, high)
    for levels, zero, scale in (
        (255, 0 * low, peak / 127),
        (15, 0 * low, peak / 7),
        (16, 0 * low, np.where(-low > high, low, high) / -8),  # as llama.cpp's Q4_0: the largest, with its sign
        (256, low, (high - low) / 255),
        (16, low, (high - low) / 15),
        (256, 0 * low, (high - low) / 255),  # an integer zero point
        (16, 0 * low, (high - low) / 15),
    ):
        yield levels, _fitted(ours - zero, theirs - zero, scale) + zero


def _fitted(ours: np.ndarray, theirs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The file's values in whole steps of a scale that is near the given one and fits ours best."""
    for _ in range(FITS):
        steps = np.rint(theirs / np.where(scale == 0, 1, scale))
        squares = np.square(steps).sum(axis=1, keepdims=True)
        scale = (ours * steps).sum(axis=1, keepdims=True) / np.where(squares == 0, 1, squares)
    return np.rint(theirs / np.where(scale == 0, 1, scale)) * scale


def fewer_bits(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """Mantissas that end in zeros, each within a rounding of the file's."""
    if ours.dtype != np.float32 or theirs.dtype != np.float32:
        return None
    zeros = _trailing_zeros(ours)
    within = 2.0 ** (zeros - 23) * np.abs(theirs.astype(np.float64))
    if zeros < 4 or _trailing_zeros(theirs) >= zeros or (np.abs(ours.astype(np.float64) - theirs) > within).any():
        return None
    return Look("values rounded to fewer bits", f"with the file's values, not {23 - zeros} bits of the mantissa")


def _trailing_zeros(array: np.ndarray) -> int:
    used = int(np.bitwise_or.reduce(np.ascontiguousarray(array).view(np.uint32).ravel()))
    return (used & -used).bit_length() - 1 if used else 32


# -- Changed a little ------------------------------------------------------------------


def low_rank(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """The difference is a product of two thin matrices, as of an adapter that was merged."""
    if ours.ndim != 2:
        return None
    if _full_rank(ours, theirs):
        return None
    a, b = _spread(ours), _spread(theirs)
    difference = a - b
    limit = min(64, min(difference.shape) // 3)
    noise = _rounding(a)
    dense = float((difference != 0).mean())
    if limit < 1 or dense < 0.5 or np.linalg.norm(difference) < ABOVE * noise:
        return None
    # A random projection spans the range of a matrix of that rank (Halko et al. 2011, algorithm 4.1).
    probe = np.random.default_rng(0).standard_normal((difference.shape[1], limit + 4))
    basis, _ = np.linalg.qr(difference @ probe)
    inside = basis.T @ difference
    outside = float(np.square(difference - basis @ inside).sum())
    values = np.linalg.svd(inside, compute_uv=False)
    # What is left of the difference without its first 0, 1, 2, … singular values.
    left = np.sqrt(outside + np.append(np.cumsum(np.square(values)[::-1])[::-1], 0.0))
    rank = int(np.argmax(left <= WITHIN * noise)) if left[-1] <= WITHIN * noise else limit + 1
    along_an_axis = any(np.ptp(difference, axis=axis).max() <= noise for axis in (0, 1))
    if rank > limit or along_an_axis:
        return None
    return Look(
        "a low-rank change, such as a merged adapter",
        f"with the file's values, from which a matrix of rank {rank} is gone",
    )


def _full_rank(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """A corner of the difference is of more than half its full rank, and so no product of thin matrices."""
    corner = (slice(CORNER), slice(CORNER))
    a, b = ours[corner].astype(np.float64), theirs[corner].astype(np.float64)
    values = np.linalg.svd(a - b, compute_uv=False)
    middle = float(values[min(64, len(values) // 3)])
    return middle > 4 * _rounding(a)


def _rounding(values: np.ndarray) -> float:
    """Size of the rounding of float64 values to the dtype that they have at most."""
    with np.errstate(over="ignore"):
        held = {bits: np.array_equal(values.astype(dtype), values) for bits, dtype in ((7, BF16), (10, np.float16))}
    # A product in float32 was rounded more than once.
    bits, times = next(((bits, 1) for bits in held if held[bits]), (23, 4))
    _, exponents = np.frexp(values)
    spacing = np.where(values == 0, 0.0, np.exp2(exponents - 1.0 - bits))
    return times * float(np.linalg.norm(spacing)) / 12**0.5


def _spread(array: np.ndarray) -> np.ndarray:
    """Rows from all over the tensor."""
    return array[:: max(1, array.size // ROWS)].astype(np.float64)


def revision(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """This and most other tensors that differ are near the file's everywhere, in the right dtype and layout.

    Of one layer alone that is more than a revision's look: a conversion may have lost as much.
    """
    if not _resembles(ours, theirs):
        return None
    values: dict[str, np.ndarray] = {}
    far = 0
    for name, array in site.candidate.stored.items():
        other = np.asarray(array)
        own = site.file.get(name)
        if own is None or other.shape != own.shape or _same_look(other, own):
            continue
        match = next((each for each in arrangements(site, name) if _resembles(other, each)), None)
        # Biases begin at zero: in a few steps they go far.
        match = own if match is None and own.ndim == 1 else match
        far += match is None
        values |= {} if match is None else {name: match}
    matrices = sum(values[name].ndim > 1 for name in values)
    if matrices < LEAST or far > matrices // 3:
        return None
    words = f"with the file's values of {len(values)} parameters"
    layers = {name.split(".")[1] if name.startswith("layers.") else "" for name in values}
    if len(layers) > 1 or "" in layers or site.candidate.config.num_hidden_layers == 1:
        return Look("weights of another revision", words, values)
    return Look(
        "weights of one layer altered", f"{words} of layer {layers.pop()} alone, {_nearness(site, values)}", values
    )


def _nearness(site: ParameterSite, values: Mapping[str, np.ndarray]) -> str:
    pairs = [(_spread(np.asarray(site.candidate.stored[name])), _spread(true)) for name, true in values.items()]
    ours, theirs = (np.concatenate([array.ravel() for array in side]) for side in zip(*pairs, strict=True))
    apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return f"which differ by {apart:.1g} of their size (correlation {_correlation(ours, theirs):.7f})"


def _same_look(ours: np.ndarray, theirs: np.ndarray) -> bool:
    few = sampled(ours)
    return equal(ours[few], theirs[few])


def _resembles(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Nearly every element differs, none by much, and the values are as fine as bfloat16's."""
    if ours.shape != theirs.shape or ours.dtype.itemsize < theirs.dtype.itemsize:
        return False
    few = sampled(ours)  # most pairs are told apart by a glance
    if _correlation(ours[few], theirs[few]) < RELATED / 2:
        return False
    many = tuple(slice(None, None, max(1, length // 256)) for length in ours.shape)
    a, b = ours[many].astype(np.float64), theirs[many].astype(np.float64)
    differs = a != b
    if a.ndim > 1 and (rows := differs.any(axis=1)).sum() > ROWS_LEAST:
        differs = differs[rows]  # training leaves the rows of ids and positions that it never saw
    changed = float(differs.mean())
    # In bfloat16 a small step leaves many values where they were.
    most = 0.9 if epsilon(ours, theirs) < 2.0**-20 else 0.3
    # Another revision may have been trained in bfloat16; a quantised tensor is coarser still.
    as_fine = len(np.unique(a)) >= 0.6 * len(np.unique(b.astype(BF16)))
    return changed > most and _correlation(a, b) > RELATED and as_fine


def _correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    a, b = (each.astype(np.float64).ravel() for each in (ours, theirs))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    # About zero, not about the mean: the weights of norms are all near one.
    return float(a @ b) / norms if norms else 0.0


# -- Unrelated -------------------------------------------------------------------------


def random_init(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """Unrelated to the file's, and distributed as fresh weights are."""
    if ours.ndim != 2 or ours.size < 500:
        return None
    a, b = _spread(ours), _spread(theirs)
    allowed = CONFIDENT / a.size**0.5
    deviation = float(a.std())
    if not deviation or not float(b.std()) or abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) > allowed:
        return None
    fresh = (a - a.mean()) / deviation
    kurtosis = float(np.square(np.square(fresh)).mean())
    centred = abs(float(a.mean())) < allowed * deviation
    # Uniform 1.8, normal cut at two deviations 2.4, normal 3.
    if not centred or not 1.8 - 10 * allowed < kurtosis < 3 + 10 * allowed:
        return None
    usual = any(abs(deviation / expected - 1) < 0.05 + allowed for expected in _deviations(site, ours, b))
    words = f"with the file's values; these are as if drawn, with a standard deviation of {deviation:.3g}"
    return Look("tensor left at its random init", words) if usual and not _rearranged(site, ours, theirs) else None


def _deviations(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[float]:
    """Of the usual initialisations: the config's, GPT-2's for residual projections, He, Glorot, LeCun, torch's."""
    c, (inputs, outputs) = site.candidate.config, ours.shape
    yield from (c.initializer_range, c.initializer_range / (2 * c.num_hidden_layers) ** 0.5, 0.02, 0.01, 1.0)
    yield from (float(theirs.std()), (2 / (inputs + outputs)) ** 0.5)
    for fan in (inputs, outputs):
        yield from (fan**-0.5, (2 / fan) ** 0.5, (3 * fan) ** -0.5)


def _rearranged(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """No fresh draw: values of the file elsewhere, a little noise added or not, or the same matrix in another basis."""
    sums = _sums(ours)
    if any(np.allclose(sums, other, rtol=_close(ours), atol=0) for other in site.once(_sums_of_file)[ours.size]):
        return True
    if abs(sums[1] / _sums(theirs)[1] - 1) < max(1e-6, _close(ours)):
        return True
    a, b = (np.sort(array.astype(np.float32), axis=None).astype(np.float64) for array in (ours, theirs))
    # Order statistics of two draws are apart by some deviations / √n; of the same values with noise, by far less.
    apart = float(np.square(a - b).mean()) ** 0.5
    return apart < APART * float(b.std()) * (2 / len(b)) ** 0.5


def _sums(array: np.ndarray) -> tuple[float, float]:
    """What no order of the values changes; the second is the same in every basis."""
    wide = array.astype(np.float64)
    return float(np.abs(wide).sum()), float(np.square(wide).sum())


def _sums_of_file(site: ParameterSite) -> Mapping[int, list[tuple[float, float]]]:
    sums: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for array in site.file.values():
        if array.ndim == 2:
            sums[array.size].append(_sums(array))
    return sums


def _close(ours: np.ndarray) -> float:
    return max(1e-7, 4 * epsilon(ours) / ours.size**0.5)
