"""Values read in another encoding, or changed by the same arithmetic everywhere.

Where nothing is lost, the change is undone in our values. Where it rounded them away,
the same change of the file's values must give exactly ours, and the file's are loaded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights.parameter_repair import Undo, both, changed, repair
from oracle.rungs.bits import ParameterSite, equal, sampled

BF16, FP16 = np.dtype(jnp.bfloat16), np.dtype(np.float16)
Elementwise = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """A mistake that maps each value by itself."""

    change: str
    """What undoes it."""
    wrong: Elementwise
    """What it makes of the file's values."""
    undo: Elementwise | None = None
    """Its inverse; None where there is none."""
    only: str = ""
    """How names of parameters end to which it can happen; all may where this is empty."""


def _as(stored: np.dtype, read: np.dtype) -> Encoding:
    return Encoding(
        f"with the bits read as {stored.name}",
        lambda theirs: theirs.astype(stored).view(read),
        lambda ours: ours.astype(read).view(stored),
    )


def _plus(by: float) -> Encoding:
    # Added in float64 and rounded once, as an exact inverse must be.
    return Encoding(
        f"with {-by:+g} added",
        lambda theirs: _rounded(theirs, theirs.astype(np.float64) + by),
        lambda ours: _rounded(ours, ours.astype(np.float64) - by),
        only="norm.weight",
    )


def _rounded(like: np.ndarray, wide: np.ndarray) -> np.ndarray:
    return wide.astype(np.float32).astype(like.dtype)


def _truncated(theirs: np.ndarray) -> np.ndarray:
    """The upper half of each float32."""
    return (theirs.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _through(dtype: np.dtype) -> Encoding:
    return Encoding(f"with the file's values, which are these before rounding to {dtype.name}", _cast(dtype))


def _cast(dtype: np.dtype) -> Elementwise:
    def cast(theirs: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return theirs.astype(np.float32).astype(dtype)

    return cast


def _swapped(array: np.ndarray) -> np.ndarray:
    # Extension dtypes such as bfloat16 know no byte order.
    width = np.dtype(f"u{array.dtype.itemsize}")
    return array.view(width).byteswap().view(array.dtype)


ROUNDINGS: tuple[tuple[str, Encoding], ...] = (
    ("values rounded to bfloat16", _through(BF16)),
    ("values rounded to float16", _through(FP16)),
    ("values truncated to bfloat16", Encoding("with the file's values, whose upper halves these are", _truncated)),
    ("values rounded to float8", _through(np.dtype(ml_dtypes.float8_e4m3fn))),
    ("values rounded to float8", _through(np.dtype(ml_dtypes.float8_e5m2))),
)
MISTAKES: tuple[tuple[str, Encoding, str], ...] = (
    ("bf16 bits read as fp16", _as(BF16, FP16), "the dtype tag in the safetensors header, or how the reader maps it"),
    ("fp16 bits read as bf16", _as(FP16, BF16), "the dtype tag in the safetensors header, or how the reader maps it"),
    (
        "byte order swapped",
        Encoding("with the bytes of each value in the other order", _swapped, _swapped),
        "safetensors are little-endian: read with `<f4`, `<f2`",
    ),
    ("sign flipped", Encoding("with the sign turned", np.negative, np.negative), "where the tensor is loaded"),
    ("(1+w) norm handling", _plus(-1.0), "the norms of this model multiply by w, those of Gemma by 1 + w: add nothing"),
    ("(1+w) norm handling", _plus(1.0), "the norms of this model multiply by w, those of Gemma by 1 + w: add nothing"),
)
READER = "(jaxgpt/formats/safetensors_file.py, jaxgpt/formats/hf.py)"


def _undone(encoding: Encoding) -> Undo:
    @both
    def undo(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
        if not site.name.endswith(encoding.only):
            return
        few = sampled(ours)
        with np.errstate(all="ignore"):
            if encoding.undo is None or ours.shape != theirs.shape or not equal(encoding.undo(ours[few]), theirs[few]):
                return
            undone = encoding.undo(ours)
        if equal(undone, theirs):
            yield changed(site, encoding.change, {site.name: undone})

    return undo


def made_by(encoding: Encoding, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """The mistake makes exactly ours of the file's values, and something is wrong with them."""
    if ours.shape != theirs.shape or not ours.any() or equal(ours, theirs):
        return False
    for part in (sampled(ours), ()):
        with np.errstate(all="ignore"):
            # Values are compared as float32: NaN and rounding to our own dtype included.
            made = encoding.wrong(theirs[part]).astype(ours.dtype).astype(np.float32)
            held = ours[part].astype(np.float32)
        if not np.array_equal(made, held, equal_nan=True):
            return False
    return True


def _reloaded(encoding: Encoding) -> Undo:
    """Every tensor of which it made ours, where it shows at the one in question.

    A tensor that was also put in another place, or transposed, gets the file's values in
    that order, so that the other mistake is found behind this one.
    """

    @both
    def undo(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
        if not site.name.endswith(encoding.only) or not made_by(encoding, ours, theirs):
            return
        values: dict[str, np.ndarray] = {site.name: theirs}
        for name, array in site.candidate.stored.items():
            orders = arrangements(site, name) if name != site.name else ()
            match = next((each for each in orders if made_by(encoding, np.asarray(array), each)), None)
            values |= {} if match is None else {name: match}
        yield changed(site, encoding.change, values)

    return undo


def _finer(dtype: np.dtype) -> Undo:
    """The file holds exactly what rounding makes of ours: nothing is wrong with ours."""
    encoding = Encoding("", _cast(dtype))

    @both
    def undo(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
        if made_by(encoding, theirs, ours):
            stored = {name: np.asarray(array) for name, array in site.candidate.stored.items()}
            files = {name: site.file[name] for name in stored if name in site.file}
            rounded = {name: file for name, file in files.items() if made_by(encoding, file, stored[name])}
            yield changed(site, f"with these values rounded to {dtype.name}, as the reference's are", rounded)

    return undo


def arrangements(site: ParameterSite, name: str) -> Iterator[np.ndarray]:
    """What a parameter's place may hold: its own tensor, that transposed, or another of its shape."""
    own = site.file.get(name)
    if own is None:
        return
    yield own
    if own.ndim == 2:
        yield own.T
    yield from (array for other, array in site.file.items() if other != name and array.shape == own.shape)


def _all(
    mistakes: tuple[tuple[str, Encoding, str], ...], make: Callable[[Encoding], Undo], lossy: bool
) -> list[Repair]:
    return [
        repair(name, f"{advice} {READER}", make(encoding), last_resort=lossy) for name, encoding, advice in mistakes
    ]


_ROUND = "keep the file's dtype where tensors are read and stored, and import without --cast"
_COARSE = "compare with a reference in the dtype that the weights were made in: the checkpoint holds more than this one"
REPAIRS: tuple[Repair, ...] = (
    *_all(MISTAKES, _undone, lossy=False),
    *(repair(f"the reference is rounded to {dtype.name}", _COARSE, _finer(dtype)) for dtype in (BF16, FP16)),
)
LOSSES: tuple[Repair, ...] = tuple(
    _all(tuple((name, encoding, _ROUND) for name, encoding in ROUNDINGS) + MISTAKES, _reloaded, lossy=True)
)
