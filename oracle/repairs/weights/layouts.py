"""One parameter whose values are all there, in another order or shape: put them back, bit for bit."""

from collections.abc import Iterator
from itertools import permutations

import numpy as np

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights.parameter_repair import both, changed, repair
from oracle.rungs.bits import EMBEDDING, HEAD, ParameterSite, equal, sampled

EMBEDDINGS = (EMBEDDING, HEAD, "embed.positions.weight")
QKV = ("attn.q", "attn.k", "attn.v")


@both
def transposed(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """The matrix the other way round."""
    if ours.ndim == 2 and equal(ours.T, theirs):
        yield changed(site, "with the matrix transposed", {site.name: ours.T})


@both
def reshaped(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Read off in the other direction and transposed, where somebody got the right shape by reshaping."""
    if ours.ndim != 2 or ours.shape != theirs.shape or ours.shape[0] == ours.shape[1]:
        return
    undone = ours.reshape(ours.shape[::-1]).T
    if equal(undone, theirs):
        yield changed(site, f"reshaped to {list(ours.shape[::-1])} and then transposed", {site.name: undone})


@both
def other_shape(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """The same values in the same order under another shape, such as heads on an axis of their own."""
    if ours.shape != theirs.shape and ours.size == theirs.size and equal(ours.reshape(theirs.shape), theirs):
        yield changed(site, f"reshaped to {list(theirs.shape)}", {site.name: ours.reshape(theirs.shape)})


# -- Rows, columns, heads --------------------------------------------------------------


def order(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """The order p of rows with `ours[p]` equal to theirs; None where there is none, or nothing to move."""
    if ours.shape != theirs.shape or ours.ndim != 2:
        return None
    ours_keys, their_keys = _keys(ours), _keys(theirs)
    ours_sorted, theirs_sorted = (np.argsort(keys, kind="stable") for keys in (ours_keys, their_keys))
    if not np.array_equal(ours_keys[ours_sorted], their_keys[theirs_sorted]):
        return None
    p = np.empty_like(ours_sorted)
    p[theirs_sorted] = ours_sorted
    moved = not np.array_equal(p, np.arange(len(p)))
    return p if moved and equal(ours[p], theirs) else None


def _keys(matrix: np.ndarray) -> np.ndarray:
    """A few elements of each row as bytes, which can be sorted."""
    few = np.ascontiguousarray(matrix[:, sampled(matrix)[1]].astype(np.float32))
    return few.view(np.dtype((np.void, few.shape[1] * few.itemsize)))[:, 0]


def heads(site: ParameterSite) -> tuple[int, int] | None:
    """(axis, number of heads) of a parameter that has any."""
    c, module = site.candidate.config, site.finding.tap.split(".", 2)[-1]
    if module == "attn.out" and site.finding.op == "kernel":
        return 0, c.num_attention_heads
    return (-1, c.num_attention_heads if module == "attn.q" else c.num_key_value_heads) if module in QKV else None


def _head_order(site: ParameterSite) -> np.ndarray | None:
    found, ours, theirs = heads(site), site.ours, site.theirs
    if found is None or ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    axis, count = found
    if ours.shape[axis] % count:
        return None
    ours, theirs = (np.moveaxis(array, axis, 0).reshape(count, -1) for array in (ours, theirs))
    return order(ours, theirs)


def _tilings(config: ModelConfig) -> list[np.ndarray]:
    """Orders of query heads that make head n read kv head n % K, where n // (N / K) is right; and back."""
    n, k = config.num_attention_heads, config.num_key_value_heads
    if k in (1, n):
        return []
    return [np.arange(n).reshape(shape).T.ravel() for shape in ((k, n // k), (n // k, k))]


def _with_heads(site: ParameterSite, change: str, order: np.ndarray) -> Variant:
    found, ours = heads(site), site.ours
    assert found is not None
    assert ours is not None
    width = ours.shape[found[0]] // found[1]
    index = (order[:, None] * width + np.arange(width)).ravel()
    return changed(site, change, {site.name: ours.take(index, axis=found[0])})


def tiled_heads(site: ParameterSite) -> Iterator[Variant]:
    """Query heads in the order of tiled kv heads."""
    p = site.once(_head_order)
    if p is not None and any(np.array_equal(p, tiling) for tiling in _tilings(site.candidate.config)):
        yield _with_heads(site, "with the query heads of one key head side by side", p)


def permuted_heads(site: ParameterSite) -> Iterator[Variant]:
    """Heads in any other order."""
    p = site.once(_head_order)
    if p is not None and not any(np.array_equal(p, tiling) for tiling in _tilings(site.candidate.config)):
        yield _with_heads(site, f"with the heads in the order {_shown(p)}", p)


def _shown(order: np.ndarray) -> str:
    return ", ".join(map(str, order[:8])) + (", …" if len(order) > 8 else "")


@both
def rope_rows(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Each query or key head in the order of interleaved pairs (Meta's files), or permuted once too often."""
    found = heads(site)
    c = site.candidate.config
    if found is None or not site.finding.tap.endswith(("attn.q", "attn.k")) or c.position_embedding != "rope":
        return
    if ours.shape != theirs.shape or ours.shape[-1] != found[1] * c.head_dim or c.head_dim < 4:
        return
    for shape, change in (
        ((c.head_dim // 2, 2), "with each head's rows 0, 2, 4, … before 1, 3, 5, …"),
        ((2, c.head_dim // 2), "with the halves of each head interleaved"),
    ):
        within = np.arange(c.head_dim).reshape(shape).T.ravel()
        index = (np.arange(found[1])[:, None] * c.head_dim + within).ravel()
        if equal(ours.take(index, axis=-1), theirs):
            yield changed(site, change, {site.name: ours.take(index, axis=-1)})
            return


def _row_order(site: ParameterSite) -> np.ndarray | None:
    ours, theirs = site.ours, site.theirs
    if ours is None or theirs is None:
        return None
    return order(ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)) if ours.ndim <= 2 else None


def _column_order(site: ParameterSite) -> np.ndarray | None:
    ours, theirs = site.ours, site.theirs
    return None if ours is None or theirs is None or ours.ndim != 2 or theirs.ndim != 2 else order(ours.T, theirs.T)


def _rolled(p: np.ndarray) -> bool:
    return len(set(((p - np.arange(len(p))) % len(p)).tolist())) == 1


@both
def rolled_rows(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Every embedding in its neighbour's place, the last one first."""
    p = site.once(_row_order) if site.name in EMBEDDINGS else None
    if p is not None and _rolled(p):
        by = int(p[0]) if p[0] <= len(p) // 2 else int(p[0]) - len(p)
        yield changed(site, f"with the rows shifted back by {by}", {site.name: ours[p]})


@both
def permuted(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Rows or columns in an order that has no name of its own."""
    if any(next(known(site), None) for known in (tiled_heads, permuted_heads, rope_rows, rolled_rows)):
        return
    for axis, name, find in ((0, "rows", _row_order), (1, "columns", _column_order)):
        p = site.once(find)
        if p is not None:
            change = f"with the {name} in the order {_shown(p)}"
            yield changed(site, change, {site.name: ours.take(p, axis=axis)})


# -- Query, key and value in one matrix ------------------------------------------------


def _packings(config: ModelConfig, fused: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Wrong ways to read a matrix of query, key and value: which of its columns ours are then."""
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    columns = np.arange((n + 2 * k) * h)
    grouped = columns.reshape(k, n // k + 2, h)
    parts = grouped[:, : n // k], grouped[:, n // k], grouped[:, n // k + 1]
    yield "query, key and value of each head side by side", np.concatenate([part.ravel() for part in parts])
    if n == k:
        for axes in permutations(range(3)):
            sizes = np.array([3, n, h])[list(axes)]
            yield (
                "its axes part, head and dimension in their order",
                columns.reshape(sizes).transpose(np.argsort(axes)).ravel(),
            )
    for cut in permutations(range(3)):
        # In a file that stores them apart, equal parts were exchanged, not cut wrongly.
        if fused or not (n == k or cut[0] == 0):
            widths = [(n * h, k * h, k * h)[part] for part in cut]
            pieces = np.split(columns, np.cumsum(widths)[:-1])
            yield "query, key and value cut in their order", np.concatenate([pieces[cut.index(i)] for i in range(3)])


def biases_alone(site: ParameterSite) -> bool:
    """The bias is wrong and its kernel right: no matrix was cut wrongly."""
    kernel = f"{site.finding.tap}.kernel"
    ours, theirs = site.candidate.stored.get(kernel), site.file.get(kernel)
    return site.finding.op == "bias" and ours is not None and theirs is not None and equal(np.asarray(ours), theirs)


def packed(site: ParameterSite) -> Iterator[Variant]:
    """All three together, their columns back where the fused matrix has them; biases with their kernels."""
    if not site.finding.tap.endswith(QKV):
        return
    found = _fused(site, site.finding.op)
    if found is None:
        return
    fused = any(p.name == site.name and p.part is not None for p in weights.parameters(site.candidate.config))
    for change, index in _packings(site.candidate.config, fused and not biases_alone(site)):
        for back in (np.argsort(index), index):
            if _moves(back, *found):
                others = {leaf: _fused(site, leaf) for leaf in ("kernel", "bias") if leaf != site.finding.op}
                also = {leaf: pair for leaf, pair in others.items() if pair and _moves(back, *pair)}
                values: dict[str, np.ndarray] = {}
                for leaf, (ours, _) in {site.finding.op: found, **also}.items():
                    values |= _cut(site, leaf, ours.take(back, axis=-1))
                yield changed(site, f"with {change}", values)
                return


def _fused(site: ParameterSite, leaf: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Query, key and value side by side: ours, and the file's."""
    names = _parts(site, leaf)
    if not all(name in site.candidate.stored and name in site.file for name in names):
        return None
    stored, given = ([np.asarray(tensors[name]) for name in names] for tensors in (site.candidate.stored, site.file))
    if any(a.shape[:-1] != b.shape[:-1] for a, b in zip(stored, given, strict=True)):
        return None
    # What comes out of one matrix has one dtype.
    if any(len({array.dtype for array in arrays}) > 1 for arrays in (stored, given)):
        return None
    return np.concatenate(stored, axis=-1), np.concatenate(given, axis=-1)


def _parts(site: ParameterSite, leaf: str) -> list[str]:
    return [f"{site.finding.tap[:-1]}{part}.{leaf}" for part in "qkv"]


def _cut(site: ParameterSite, leaf: str, fused: np.ndarray) -> dict[str, np.ndarray]:
    names = _parts(site, leaf)
    widths = [np.shape(site.candidate.stored[name])[-1] for name in names]
    return dict(zip(names, np.split(fused, np.cumsum(widths)[:-1], axis=-1), strict=True))


def _moves(back: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """The order of columns makes ours theirs, and is one; most are ruled out by the first row."""
    first = slice(None) if ours.ndim == 1 else slice(1)
    return (
        ours.shape == theirs.shape
        and len(back) == ours.shape[-1]
        and not np.array_equal(back, np.arange(len(back)))
        and equal(ours[first].take(back, axis=-1), theirs[first])
        and equal(ours.take(back, axis=-1), theirs)
    )


@both
def not_split(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Ours is the whole of a fused tensor, the file's a part of it."""
    if site.name in EMBEDDINGS or ours.ndim != theirs.ndim or next(repeated_heads(site), None) is not None:
        return
    for axis in range(ours.ndim):
        width = theirs.shape[axis]
        for start in range(0, ours.shape[axis] - width + 1, width):
            part = np.take(ours, np.arange(start, start + width), axis=axis)
            if ours.shape != theirs.shape and equal(part, theirs):
                yield changed(site, f"with its part {start}…{start + width - 1} alone", {site.name: part})
                return


@both
def repeated_heads(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """Key and value heads written out for every query head."""
    h = site.candidate.config.head_dim
    if not site.finding.tap.endswith(QKV[1:]) or ours.shape[:-1] != theirs.shape[:-1] or theirs.shape[-1] % h:
        return
    times, rest = divmod(ours.shape[-1], theirs.shape[-1])
    if times < 2 or rest:
        return
    lead, k = ours.shape[:-1], theirs.shape[-1] // h
    for grid, axis, change in (((k, times, h), -2, "repeated"), ((times, k, h), -3, "tiled")):
        copies = np.moveaxis(ours.reshape(*lead, *grid), axis, 0)
        if all(equal(copy.reshape(theirs.shape), theirs) for copy in copies):
            first = copies[0].reshape(theirs.shape)
            yield changed(site, f"with one of {times} {change} copies of each head", {site.name: first})


REPAIRS: tuple[Repair, ...] = (
    repair(
        "kernel transposed",
        "which way its file stores it: Conv1D stores (in, out), as jaxgpt does, Linear (out, in); `transposed` in "
        "jaxgpt/weights.py (`_row`) says so",
        transposed,
    ),
    repair(
        "reshaped instead of transposed",
        "transpose (.T), do not reshape, where the layouts are changed (to_ours in jaxgpt/weights.py)",
        reshaped,
    ),
    repair(
        "qkv packing order",
        "where the fused matrix is cut into q, k and v (the (index, count) of attn.q, attn.k and attn.v in the name "
        "table of jaxgpt/weights.py): its columns are [part, head, dimension]",
        packed,
    ),
    repair(
        "GQA repeat against tile",
        "query head n reads key head n // (N / K): keep the file's order of heads where q and attn.out are loaded "
        "(jaxgpt/weights.py), and repeat, not tile, in the scores and context ops (jaxgpt/ops.py)",
        tiled_heads,
    ),
    repair(
        "rows permuted for interleaved RoPE",
        "rope here turns the pairs (i, i + H/2): permute q and k of a Meta-format file exactly once where they are "
        "loaded (jaxgpt/weights.py), and those of a Hugging Face file not at all",
        rope_rows,
    ),
    repair(
        "heads permuted",
        "keep the file's order of heads where it is loaded (to_ours in jaxgpt/weights.py)",
        permuted_heads,
    ),
    repair(
        "embedding rows shifted",
        "row i belongs to token (or position) i: look for an offset where it is loaded (jaxgpt/formats/hf.py), "
        "such as a row that a padding token takes",
        rolled_rows,
    ),
    repair(
        "rows or columns in another order",
        "keep the file's order where it is loaded (to_ours in jaxgpt/weights.py)",
        permuted,
    ),
    repair(
        "key and value heads repeated",
        "store each key and value head once: num_key_value_heads in config.json, and its row in jaxgpt/weights.py",
        repeated_heads,
    ),
    repair(
        "fused tensor not split",
        "which part of the fused tensor it is: the (index, count) of its row in the name table of jaxgpt/weights.py",
        not_split,
    ),
    repair(
        "another shape with the same values",
        "give it the shape of its row in jaxgpt/weights.py, with heads on the last axis",
        other_shape,
    ),
)
