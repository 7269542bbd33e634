"""Repairs of heads, their order, and the scores."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.black_box import BlackBox, Change, op_repair
from oracle.repairs.repair import Repair

_SPLIT = ("split_query_heads", "split_kv_heads")
_HEADS = (*_SPLIT, "merge_heads")

# -- Splitting and merging -------------------------------------------------------------


def _heads(box: BlackBox) -> int:
    return box.facts.kv_heads if box.site.op.function == "split_kv_heads" else box.facts.heads


def dimension_major(box: BlackBox) -> Iterator[Change]:
    """Heads that lie dimension by dimension, with the head running fastest."""
    change, heads = "with each head's dimensions next to each other", _heads(box)
    if box.site.op.function == "merge_heads":
        yield box.turned(change, lambda y, _: _regrouped(y, -1, heads))
    else:
        yield box.fed(change, lambda x: (_regrouped(x, heads, -1),))


def _regrouped(x: Any, outer: int, inner: int) -> Any:
    grouped = x.reshape(*x.shape[:-1], outer, inner)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


def not_moved(box: BlackBox) -> Iterator[Change]:
    """A reshape where heads and time must change places."""
    change, heads = "with heads moved before time", _heads(box)

    def split(x: Any) -> tuple[Any]:
        batch, time, width = x.shape
        return (x.reshape(batch, time, heads, width // heads).swapaxes(1, 2).reshape(x.shape),)

    def merged(y: Any, x: Any) -> Any:
        return y.reshape(x.shape).swapaxes(1, 2).reshape(y.shape)

    yield box.turned(change, merged) if box.site.op.function == "merge_heads" else box.fed(change, split)


def backwards(box: BlackBox) -> Iterator[Change]:
    """The last head first."""
    change = "with the heads in order"
    merging = box.site.op.function == "merge_heads"
    yield box.fed(change, lambda x: (x[:, ::-1],)) if merging else box.turned(change, lambda y, _: y[:, ::-1])


def head_count(box: BlackBox) -> Iterator[Change]:
    """The reference's numbers of heads."""
    f = box.facts
    yield from box.configured(
        f"with {f.heads} query and {f.kv_heads} kv heads of {f.head_dim} in the config",
        num_attention_heads=f.heads,
        num_key_value_heads=f.kv_heads,
        head_dim=f.head_dim,
    )


# -- Which query head reads which kv head ----------------------------------------------


def tiled(box: BlackBox) -> Iterator[Change]:
    """Query head n must read kv head n // (N / K), not n mod K: put the heads where the op looks for them."""
    heads, kv_heads = box.facts.heads, box.facts.kv_heads
    if kv_heads in (1, heads):
        return
    n = np.arange(heads)
    place = (n % (heads // kv_heads)) * kv_heads + n // (heads // kv_heads)

    def repaired(config: ModelConfig, p: Leaves, x: Any, kv: Any) -> Any:
        return box.function(config, p, x[:, np.argsort(place)], kv)[:, place]

    yield "with each kv head repeated, not the heads tiled", repaired


def kv_backwards(box: BlackBox) -> Iterator[Change]:
    """The kv heads the other way round."""
    if box.facts.kv_heads > 1:
        yield box.fed("with the kv heads in order", lambda x, kv: (x, kv[:, ::-1]))


def kv_rolled(box: BlackBox) -> Iterator[Change]:
    """The kv heads one further."""
    if box.facts.kv_heads > 2:
        for by in (1, -1):
            yield box.fed("with the kv heads in order", lambda x, kv, by=by: (x, jnp.roll(kv, by, axis=1)))


# -- Scores and context ----------------------------------------------------------------


def scale(change: str, factor: Callable[[BlackBox], float]) -> Callable[[BlackBox], Iterator[Change]]:
    """Scores multiplied."""

    def maker(box: BlackBox) -> Iterator[Change]:
        yield box.scaled(f"with scores multiplied by {change}", factor(box))

    return maker


def other_width(box: BlackBox) -> Iterator[Change]:
    """1/√ of another width than H."""
    f = box.facts
    widths = {
        "D": f.width,
        "D/N": f.width / f.heads,
        "K·H": f.kv_heads * f.head_dim,
        "N": f.heads,
        "H/2": f.head_dim / 2,
    }
    for name, width in widths.items():
        if width not in (1, f.head_dim, f.head_dim**2):
            yield box.scaled(f"with 1/√H instead of 1/√({name})", (width / f.head_dim) ** 0.5)


CAPS = (10.0, 20.0, 30.0, 50.0, 100.0)
"""Soft caps of published models, and round numbers."""


def capped(box: BlackBox) -> Iterator[Change]:
    """Scores through cap * tanh(x / cap)."""

    def scores(p: Leaves, q: Any, k: Any) -> Any:
        keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
        return jnp.einsum("bnth,bnsh->bnts", q, keys) * q.shape[-1] ** -0.5

    for cap in CAPS:
        yield box.less(
            lambda p, q, k, cap=cap: cap * jnp.tanh(scores(p, q, k) / cap), scores, f"a soft cap at {cap:g}", "none"
        )


def swapped(box: BlackBox) -> Iterator[Change]:
    """Queries by keys instead of keys by queries, or the reverse, where both are as many."""
    first, second = (np.shape(given) for given in box.site.inputs)
    if box.site.op.function == "scores" and first == second:
        yield box.turned("with the scores transposed", lambda y, *_: y.swapaxes(-1, -2))
    if box.site.op.function == "context" and first[-1] == first[-2]:
        yield box.fed("with the weights transposed", lambda weights, v: (weights.swapaxes(-1, -2), v))


_ORDER = "heads are (B, T, N·H) to (B, N, T, H), head by head: _split_heads and merge_heads in jaxgpt/ops.py"
_GROUPS = "query head n reads kv head n // (N // K): scores and context in jaxgpt/ops.py"
_SCALE = "scores are q·k / √H: the scores op in jaxgpt/ops.py"
_BOTH = ("scores", "context")
REPAIRS: tuple[Repair, ...] = (
    op_repair("number of heads wrong", "check the head fields of the config (jaxgpt/config.py)", _HEADS, head_count),
    op_repair("heads split or merged dimension by dimension", _ORDER, _HEADS, dimension_major),
    op_repair("heads and time not exchanged", _ORDER, _HEADS, not_moved),
    op_repair("heads in reverse order", _ORDER, _HEADS, backwards),
    op_repair("kv heads tiled instead of repeated", _GROUPS, _BOTH, tiled),
    op_repair("kv heads in the wrong order", _GROUPS, _BOTH, kv_backwards),
    op_repair("kv heads in the wrong order", _GROUPS, _BOTH, kv_rolled),
    op_repair("queries and keys exchanged", "see scores and context in jaxgpt/ops.py", _BOTH, swapped),
    op_repair("attention scale missing", _SCALE, ("scores",), scale("1/√H", lambda box: box.facts.head_dim**-0.5)),
    op_repair("attention scale applied twice", _SCALE, ("scores",), scale("√H", lambda box: box.facts.head_dim**0.5)),
    op_repair("attention scale of another width", _SCALE, ("scores",), other_width),
    op_repair("attention scores soft-capped", _SCALE, ("scores",), capped),
)
"""Repairs of heads and scores."""
