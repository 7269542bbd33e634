"""What the difference of two tensors of one shape looks like, where the right values are lost.

Nothing is undone in our values here: the file's are loaded, and the name rests on the
look of the difference. So each look is strict, and they are tried in one order (the
table of `oracle.repairs.weights.parameters`), of which only the first that fits may speak.
"""

from dataclasses import dataclass, field

import numpy as np

from oracle.rungs.bits import ParameterSite, equal, is_finite, sampled

FEW = 4
"""So many wrong elements are few in any tensor of four times as many; of large ones, one in THOUSANDTH."""
THOUSANDTH = 1000
NORMS = ("attn_norm", "mlp_norm", "final_norm", "q_norm", "k_norm")
READ_BY = {"attn_norm": ("attn.q", "attn.k", "attn.v"), "mlp_norm": ("mlp.gate", "mlp.up")}


@dataclass(frozen=True)
class Look:
    """A name for a difference, and what has to be loaded to undo it."""

    cause: str
    change: str
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Parameters to load; by default the one in question."""


def epsilon(*arrays: np.ndarray) -> float:
    """Of the coarsest of the arrays' dtypes, relative."""
    return max({2: 2.0**-8 if a.dtype.name == "bfloat16" else 2.0**-11}.get(a.dtype.itemsize, 2.0**-24) for a in arrays)


def unequal(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where the values differ, whatever the dtypes are: float16 and bfloat16 cannot be compared as they are."""
    if ours.dtype == theirs.dtype:
        return ours != theirs
    with np.errstate(invalid="ignore", over="ignore"):
        return ours.astype(np.float32) != theirs.astype(np.float32)


def not_finite(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """NaN or infinity at some places, everything else as in the file."""
    finite = is_finite(ours)
    if finite.all() or not finite.any() or (unequal(ours, theirs) & finite).any():
        return None
    return Look("NaN or infinite values", f"with the file's {int((~finite).sum()):,} values there")


def constant(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """All zeros, or a norm's ones."""
    if not ours.any():
        return Look("bias dropped" if site.finding.op == "bias" else "tensor of zeros", "with the file's values")
    if site.finding.op != "weight" or not site.finding.tap.endswith(NORMS) or not (ours == 1).all():
        return None
    return _folded(site, theirs) or Look("tensor left at its random init", "with the file's values, not ones")


def _folded(site: ParameterSite, norm: np.ndarray) -> Look | None:
    """The norm's weights are in the projections that read it."""
    layer, _, module = site.finding.tap.rpartition(".")
    readers = [f"{layer}.{name}.kernel" for name in READ_BY.get(module, ())] if layer else ["head.weight"]
    present = [name for name in readers if name in site.file and name in site.candidate.stored]
    weights = norm.astype(np.float64)
    for name in present:
        ours, theirs = (a.astype(np.float64) for a in (np.asarray(site.candidate.stored[name]), site.file[name]))
        expected = theirs * (weights if name == "head.weight" else weights[:, None])
        if ours.shape != theirs.shape or np.abs(ours - expected).max() > 4 * epsilon(norm) * np.abs(expected).max():
            return None
    values = {name: site.file[name] for name in (site.name, *present)}
    return Look("norm weights folded into the next projection", "with the file's values", values) if present else None


def shifted(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """Each value at another place of the file's tensor, all by the same distance; the ends are lost."""
    flat, theirs_flat = ours.ravel(), theirs.ravel()
    middle = slice(len(flat) // 2, len(flat) // 2 + FEW)
    if len(flat) < 4 * FEW or len(set(flat[middle].tolist())) < FEW:
        return None
    for start in np.flatnonzero(theirs_flat == flat[middle.start]).tolist():
        by = start - middle.start
        ours_part, theirs_part = (flat[:-by], theirs_flat[by:]) if by > 0 else (flat[-by:], theirs_flat[:by])
        if by and abs(by) <= len(flat) // 2 and equal(ours_part, theirs_part):
            rows, rest = divmod(abs(by), ours[:1].size)
            name = "embedding rows shifted" if not rest and "embed" in site.name else "read from a wrong offset"
            return Look(name, f"with the file's values, {f'{rows} rows' if not rest else f'{abs(by)} values'} away")
    return None


def few_elements(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """So few that nothing but damage explains them."""
    count = int(unequal(ours, theirs).sum())
    if not 0 < count <= max(FEW, ours.size // THOUSANDTH) or count * 4 > ours.size:
        return None
    return Look("a few elements corrupted", f"with the file's values of the {count:,} elements that differ")


def zeroed(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """Pruned or masked: zero wherever it differs."""
    wrong = unequal(ours, theirs)
    if not wrong.any() or ours[wrong].any():
        return None
    count = int(wrong.sum())
    return Look("some elements zeroed", f"with the file's values of the {count:,} of {ours.size:,} elements that are 0")


def scaled(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Look | None:
    """One factor for all, up to the rounding of the product."""
    few, eps = sampled(ours), epsilon(ours, theirs)
    a, b = ours[few].astype(np.float64), theirs[few].astype(np.float64)
    norm = float(np.square(b).sum())
    scale = float((a * b).sum()) / norm if norm else 0.0
    if abs(scale) < eps or abs(scale - 1) < 8 * eps or (np.abs(a - scale * b) > 3 * eps * np.abs(a)).any():
        return None
    if (np.abs(ours - np.float64(scale) * theirs.astype(np.float64)) > 3 * eps * np.abs(ours)).any():
        return None
    return Look("tensor scaled by a constant", f"with the file's values, of which these are {scale:.6g} times")
