"""Repairs of heads, their order, and the scores."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, op_repair
from oracle.repairs.ops.rope import rotated, stretch
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


# -- Heads that are normalised ----------------------------------------------------------

EPSILONS = (1e-5, 1e-6, 1e-8, 0.0)


def normalised(box: BlackBox) -> Iterator[Change]:
    """Queries or keys over their root mean square, length or spread, of each head or of all heads together."""
    for named, divided in NORMS.items():
        for eps in EPSILONS:

            def wrong(*x: Any, divided: Any = divided, eps: float = eps) -> Any:
                return divided(_proper(box, *x), eps)

            yield from box.answering(f"with heads that are not divided by {named}", wrong, lambda *x: _proper(box, *x))


def _proper(box: BlackBox, x: Any, *angles: Any) -> Any:
    if angles:
        return rotated(x, *angles, times=stretch(box))
    return x.reshape(*x.shape[:2], _heads(box), -1).swapaxes(1, 2)


def _root(x: Any, eps: float, axes: tuple[int, ...] = (-1,)) -> Any:
    return jnp.sqrt(jnp.square(x).mean(axes, keepdims=True) + eps)


NORMS: dict[str, Callable[[Any, float], Any]] = {
    "their root mean square": lambda x, eps: x / _root(x, eps),
    "the root mean square of all heads": lambda x, eps: x / _root(x, eps, (1, 3)),
    "their length": lambda x, eps: x / (_root(x, eps) * x.shape[-1] ** 0.5),
    "their standard deviation": lambda x, eps: (
        (x - x.mean(-1, keepdims=True)) / _root(x - x.mean(-1, keepdims=True), eps)
    ),
}
"""By what the heads are divided by; the last takes their mean away as well."""


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


PROBED = 8
"""Queries that tell which heads an op multiplies."""


def regrouped(box: BlackBox) -> Iterator[Change]:
    """Query heads in another order, each with a kv head: put both where the op looks for them."""
    pairs = _pairs(box)
    queries = [query for query, _ in pairs]
    if sorted(queries) != list(range(box.facts.heads)) or queries == sorted(queries):
        return
    times = box.facts.heads // box.facts.kv_heads
    wanted = {kv: head // times for head, (_, kv) in enumerate(pairs)}
    if all(wanted[kv] == head // times for head, (_, kv) in enumerate(pairs)) and len(wanted) == box.facts.kv_heads:
        own, others = np.argsort(queries), np.array([wanted[kv] for kv in sorted(wanted)])
        yield box.fed("with the query heads in order", lambda x, kv: (x[:, own], kv[:, others]))


def _pairs(box: BlackBox) -> list[tuple[int, int]]:
    """The query head and the kv head whose product each head of the answer is; none where one is no such product."""
    x, kv = (np.asarray(given, np.float32)[:1] for given in box.site.inputs)
    if box.answer.shape != box.site.truth.shape:
        return []
    x, y = x[:, :, :PROBED], box.answer[:1, :, :PROBED]
    if box.site.op.function == "scores":
        products = np.einsum("bnth,bksh->nkbts", x, kv) * x.shape[-1] ** -0.5
    else:
        products = np.einsum("bnts,bksh->nkbth", x, kv)
    pairs: list[tuple[int, int]] = []
    for head in range(y.shape[1]):
        errors = np.linalg.norm((products - y[:, head]).reshape(*products.shape[:2], -1), axis=-1)
        best = np.unravel_index(int(errors.argmin()), errors.shape)
        if not errors[best] <= 16 * box.epsilon * np.linalg.norm(y[:, head]):
            return []
        pairs.append((int(best[0]), int(best[1])))
    return pairs


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


def distance_bias(box: BlackBox) -> Iterator[Change]:
    """Scores to which each head adds a line over the distance of the key: what the op gives for q = 0, taken away."""
    bias = box.given([np.zeros_like(given) for given in map(np.asarray, box.site.inputs)]).astype(np.float64)
    time, source = np.tril_indices(bias.shape[-2], 0, bias.shape[-1])
    seen = bias[..., time, source].reshape(-1, len(time))
    line = np.stack([source, time, np.ones_like(time)], axis=-1).astype(np.float64)
    slopes = np.linalg.lstsq(line, seen.T, rcond=None)[0]
    size = np.abs(seen).max(initial=0.0)
    if size and np.abs(slopes[0]).max() * bias.shape[-1] > 1e-3 * size and _near(line @ slopes, seen.T, 1e-5 * size):

        def repaired(config: ModelConfig, p: Leaves, q: Any, k: Any) -> Any:
            alone = box.function(config, p, jnp.zeros_like(q), jnp.zeros_like(k))
            return box.function(config, p, q, k) - alone

        yield "with what it adds to scores of 0 taken away", repaired


def _near(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> bool:
    return bool(np.isfinite(wanted).all() and (np.abs(found - wanted) <= tolerance).all())


_ORDER = "heads are (B, T, N·H) to (B, N, T, H), head by head: _split_heads and merge_heads in jaxgpt/ops.py"
_GROUPS = "query head n reads kv head n // (N // K): scores and context in jaxgpt/ops.py"
_QUERIES = "split the N query heads into (K, N // K), kv head first, in the {} op of jaxgpt/ops.py"
_SCALE = "scores are q·k / √H: the scores op in jaxgpt/ops.py"
_BOTH = ("scores", "context")
REPAIRS: tuple[Repair, ...] = (
    op_repair("number of heads wrong", "check the head fields of the config (jaxgpt/config.py)", _HEADS, head_count),
    op_repair("heads split or merged dimension by dimension", _ORDER, _HEADS, dimension_major),
    op_repair("heads and time not exchanged", _ORDER, _HEADS, not_moved),
    op_repair("heads in reverse order", _ORDER, _HEADS, backwards),
    op_repair(
        "queries or keys normalised",
        "QK-norm is an op of its own where a model has it: _split_heads and rope in jaxgpt/ops.py normalise nothing",
        (*_SPLIT, "rope"),
        normalised,
    ),
    op_repair("kv heads tiled instead of repeated", _GROUPS, _BOTH, tiled),
    op_repair("query heads grouped in another order", _QUERIES.format("scores"), ("scores",), regrouped),
    op_repair("query heads grouped in another order", _QUERIES.format("context"), ("context",), regrouped),
    op_repair("kv heads in the wrong order", _GROUPS, _BOTH, kv_backwards),
    op_repair("kv heads in the wrong order", _GROUPS, _BOTH, kv_rolled),
    op_repair("queries and keys exchanged", "see scores and context in jaxgpt/ops.py", _BOTH, swapped),
    op_repair("attention scale missing", _SCALE, ("scores",), scale("1/√H", lambda box: box.facts.head_dim**-0.5)),
    op_repair("attention scale applied twice", _SCALE, ("scores",), scale("√H", lambda box: box.facts.head_dim**0.5)),
    op_repair("attention scale of another width", _SCALE, ("scores",), other_width),
    op_repair("attention scores soft-capped", _SCALE, ("scores",), capped),
    op_repair(
        "linear position bias added to the scores",
        "this model has no ALiBi: the scores op in jaxgpt/ops.py adds nothing to q·k / √H",
        ("scores",),
        distance_bias,
    ),
)
"""Repairs of heads and scores."""
