"""Repairs of what is linear: projections, the head, embeddings and the residual sum."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, Maker, nice, op_repair, wide
from oracle.repairs.repair import Repair

# -- Projection ------------------------------------------------------------------------


def other_kernel(change: str, kernel: Any) -> Maker:
    """With another kernel, made from the one it has."""

    def maker(box: BlackBox) -> Iterator[Change]:
        def repaired(config: ModelConfig, p: Leaves, x: Any) -> Any:
            return box.function(config, {**p, "kernel": kernel(p["kernel"])}, x)

        yield change, repaired

    return maker


def transposed(box: BlackBox) -> Iterator[Change]:
    """The transposed kernel, where it has the same shape."""
    if _is_square(box):
        yield from other_kernel("with the kernel transposed", lambda kernel: kernel.T)(box)


def reshaped(box: BlackBox) -> Iterator[Change]:
    """The kernel's values in the order in which a reshape puts them right; of a square one that is the transpose."""
    if not _is_square(box):
        yield from other_kernel("with the kernel rearranged", lambda kernel: kernel.T.reshape(kernel.shape))(box)


def _is_square(box: BlackBox) -> bool:
    rows, columns = box.parameters["kernel"].shape
    return rows == columns


def bias(change: str, times: int) -> Maker:
    """With the bias added so many times more."""

    def maker(box: BlackBox) -> Iterator[Change]:
        if "bias" in box.parameters:
            added = times * box.parameters["bias"]
            yield box.turned(change, lambda y, *_: wide(y) + added)

    return maker


# -- Embedding -------------------------------------------------------------------------


def position(by: int) -> Maker:
    """Ids or positions shifted."""

    def maker(box: BlackBox) -> Iterator[Change]:
        if box.site.op.inputs == ("positions",):
            yield box.fed(f"with positions {'raised' if by > 0 else 'lowered'} by {abs(by)}", lambda x: (x + by,))

    return maker


def token(by: int) -> Maker:
    """Ids shifted."""

    def maker(box: BlackBox) -> Iterator[Change]:
        if box.site.op.inputs == ("ids",):
            yield box.fed(f"with ids {'raised' if by > 0 else 'lowered'} by {abs(by)}", lambda ids: (ids + by,))

    return maker


def restarting(box: BlackBox) -> Iterator[Change]:
    """An op that gives position t's values at time t: take those of each token's own position."""
    if box.site.op.inputs != ("positions",):
        return
    # It counts for itself if other positions make no difference.
    if np.array_equal(box.answer, box.given([np.zeros_like(np.asarray(box.site.inputs[0]))])):
        change = "with each token's position in its own document"
        yield box.turned(change, lambda y, x: jnp.take_along_axis(y, x[..., None], axis=1))


HALF = {"float32": 12, "bfloat16": 4}
"""Digits of half a number, in bits."""


def multiplied(box: BlackBox) -> Iterator[Change]:
    """Rows multiplied by √D: divide, without losing a digit, by giving it the weights in two halves."""
    scale = float(np.sqrt(box.facts.width))
    bits = HALF[box.site.candidate.dtype]

    def repaired(config: ModelConfig, p: Leaves, ids: Any) -> Any:
        weight = p["weight"].astype(jnp.float32)
        high = _rounded(weight, bits)
        halves = (high, _rounded(weight - high, bits))
        parts = [box.function(config, {"weight": half.astype(p["weight"].dtype)}, ids) for half in halves]
        # Half as many digits survive the product and the quotient; the sum of both halves is exact.
        divided = [_rounded(wide(part) / np.float32(scale), bits) for part in parts]
        return (divided[0] + divided[1]).astype(parts[0].dtype)

    yield f"divided by √D = {scale:.6g}", repaired


def _rounded(x: Any, bits: int) -> Any:
    mantissa, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.round(mantissa * 2.0**bits) * 2.0**-bits, exponent)


# -- Head ------------------------------------------------------------------------------

CAPS = (10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
"""Soft caps of published models, and round numbers."""


def capped(box: BlackBox) -> Iterator[Change]:
    """Logits through cap * tanh(x / cap)."""
    weight = jnp.asarray(box.parameters["weight"])

    def logits(p: Leaves, x: Any) -> Any:
        return jnp.einsum("btd,vd->btv", x, weight)

    for cap in CAPS:
        # cap is a default argument: the loop goes on.
        yield box.less(
            lambda p, x, cap=cap: cap * jnp.tanh(logits(p, x) / cap), logits, f"a soft cap at {cap:g}", "none"
        )


# -- Residual sum ----------------------------------------------------------------------


def summed(change: str, stream: float, branch: float, *, at_embedding: bool | None = None) -> Maker:
    """An op that gives `stream * x + branch * y`: divide what it multiplies, add what it drops."""

    def maker(box: BlackBox) -> Iterator[Change]:
        if at_embedding not in (None, box.site.op.tap == "embed.sum"):
            return

        def repaired(config: ModelConfig, p: Leaves, x: Any, y: Any) -> Any:
            given = [_divided(each, by) for each, by in ((x, stream), (y, branch))]
            dropped = [wide(each) for each, by in ((x, stream), (y, branch)) if not by]
            total: Any = sum(dropped, wide(box.function(config, p, *given)))
            return total.astype(x.dtype)

        yield change, repaired

    return maker


def _divided(x: Any, by: float) -> Any:
    return x if by in (0, 1) else wide(x) / np.float32(by)


def _factors(box: BlackBox) -> tuple[float, float] | None:
    """(a, b) of an answer a x + b y; nothing where it is no such sum."""
    x, y = (np.asarray(given).astype(np.float64).ravel() for given in box.site.inputs)
    answer = box.answer.astype(np.float64).ravel()
    if answer.shape != x.shape or not np.isfinite(answer).all():
        return None
    system = np.stack([x, y], axis=1)
    factors = np.linalg.lstsq(system, answer, rcond=None)[0]
    left = np.linalg.norm(answer - system @ factors)
    fits = left <= 4 * box.epsilon * np.linalg.norm(answer)
    return (float(factors[0]), float(factors[1])) if fits else None


def scaled_branch(box: BlackBox) -> Iterator[Change]:
    """x + c y for the c that its answer shows."""
    factors = _factors(box)
    if factors and abs(factors[0] - 1) < 8 * box.epsilon and not _has_a_name(factors[1]):
        c = nice(factors[1], 8 * box.epsilon)
        yield next(summed(f"with the branch multiplied by {1 / c:.6g}", 1, c)(box))


def scaled_stream(box: BlackBox) -> Iterator[Change]:
    """c x + y for the c that its answer shows."""
    factors = _factors(box)
    if factors and abs(factors[1] - 1) < 8 * box.epsilon and not _has_a_name(factors[0]):
        c = nice(factors[0], 8 * box.epsilon, box.facts.constants)
        yield next(summed(f"with the stream multiplied by {1 / c:.6g}", c, 1)(box))


def _has_a_name(factor: float) -> bool:
    return any(abs(factor - named) < 1e-3 for named in (-1, 0, 2))


_PROJECTION = "the projection op in jaxgpt/ops.py is x @ kernel + bias, with the kernel (in, out)"
_POSITIONS = "check the positions that are given to the op: uncached_inputs and cached_inputs in jaxgpt/model.py"
_SUM = "the residual sum is stream + branch: add in jaxgpt/ops.py, residual_ops in jaxgpt/taps.py"
_HEAD = "the head op in jaxgpt/ops.py gives x @ weight.T and nothing else"
REPAIRS: tuple[Repair, ...] = (
    op_repair("bias dropped", _PROJECTION, ("projection",), bias("with the bias added", 1)),
    op_repair("bias added twice", _PROJECTION, ("projection",), bias("with the bias taken away once", -1)),
    op_repair("kernel transposed", _PROJECTION, ("projection",), transposed),
    op_repair("kernel reshaped instead of transposed", _PROJECTION, ("projection",), reshaped),
    op_repair("position ids off by one", _POSITIONS, ("embed", "angles"), position(-1)),
    op_repair("position ids off by one", _POSITIONS, ("embed", "angles"), position(1)),
    op_repair("position ids off by two", _POSITIONS, ("embed", "angles"), position(-2)),
    op_repair("position ids do not restart with a document", _POSITIONS, ("embed", "angles"), restarting),
    op_repair("token ids off by one", "check where ids are made", ("embed",), token(-1)),
    op_repair("token ids off by one", "check where ids are made", ("embed",), token(1)),
    op_repair("embedding multiplied by √D", "do not scale it: embed in jaxgpt/ops.py", ("embed",), multiplied),
    op_repair("logits soft-capped", _HEAD, ("head",), capped),
    op_repair("position embedding not added", _SUM, ("add",), summed("with it added", 1, 0, at_embedding=True)),
    op_repair("token embedding not added", _SUM, ("add",), summed("with it added", 0, 1, at_embedding=True)),
    op_repair("residual branch dropped", _SUM, ("add",), summed("with the branch added", 1, 0, at_embedding=False)),
    op_repair("residual stream dropped", _SUM, ("add",), summed("with the stream added", 0, 1, at_embedding=False)),
    op_repair("residual branch added twice", _SUM, ("add",), summed("with the branch taken away once", 1, 2)),
    op_repair("residual stream added twice", _SUM, ("add",), summed("with the stream taken away once", 2, 1)),
    op_repair("residual branch subtracted", _SUM, ("add",), summed("with the branch added twice", 1, -1)),
    op_repair("residual branch scaled", _SUM, ("add",), scaled_branch),
    op_repair("residual stream scaled", _SUM, ("add",), scaled_stream),
)
"""Repairs of projections, embeddings, sums and the head."""
