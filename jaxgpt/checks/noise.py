"""How far logits move when every operation rounds differently: measured, never typed in.

Two correct paths to the same logits differ because they add in another order. How
much that matters depends on the weights, so it is measured on them: the same
forward is run once more with every number that an arithmetic op gives moved up or
down, at random, by what one rounding in its dtype may cost (Monte Carlo arithmetic:
Parker, Pierce & Eggert 2000).
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt import model, taps
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, OpFunction

ALLOWED = 4.0
"""Multiples of the measured noise within which two paths agree. Correct paths of random models, 36 to 768
wide and up to 1,024 tokens long, were measured at up to 1.4 on a CPU; a cache position off by one reached 12
(bfloat16, RoPE) to a million (float32)."""

ARITHMETIC = (
    *("norm", "projection", "rope", "scores", "softmax", "context"),
    *("activation", "gated_activation", "add", "head"),
)
"""Ops that round; the others only move numbers."""


def rounded_otherwise() -> model.Replacements:
    """Every op that rounds, with each number of its output moved by the error of one rounding."""
    count = itertools.count(1)

    def moved(function: OpFunction) -> OpFunction:
        def op(config: ModelConfig, p: model.Params, *inputs: Array) -> Array:
            exact = function(config, p, *inputs)
            error = 0.5 * float(jnp.finfo(exact.dtype).eps) * _signs(exact.shape, next(count))
            return (exact * (1 + error)).astype(exact.dtype)

        return op

    return {name: moved(FUNCTIONS[name]) for name in ARITHMETIC}


def _signs(shape: tuple[int, ...], seed: int) -> Array:
    """-1 or 1, scattered by an integer hash: JAX's own generator would take most of the compile time."""
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32((seed * 0x9E3779B9) % 2**32)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 15)) * jnp.uint32(multiplier)
    return jnp.where((x >> 16) & 1, 1.0, -1.0).reshape(shape)


@partial(jax.jit, static_argnames=("config", "tail", "moved"))
def uncached(
    config: ModelConfig, params: model.Params, ids: Int[Array, "B T"], *, tail: int, moved: bool = False
) -> Float[Array, "B tail V"]:
    """Logits of the last `tail` places of whole sequences; `moved`: rounded otherwise."""
    replace = rounded_otherwise() if moved else model.UNCHANGED
    # Only the last places go through the head: all logits of a long context may not fit in memory.
    last = model.forward(config, params, ids, replace=replace).taps["final_norm"][:, -tail:]
    return model.run_op(config, params, taps.ops(config)[-1], [last], replace)


@partial(jax.jit, static_argnames=("config", "moved"))
def cached(
    config: ModelConfig,
    params: model.Params,
    cache: KVCache,
    ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
    *,
    moved: bool = False,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Logits of tokens that continue a cache, and the new cache; `moved`: rounded otherwise."""
    replace = rounded_otherwise() if moved else model.UNCHANGED
    output, cache = model.forward_cached(config, params, ids, counts, cache, replace=replace)
    return output.logits, cache


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square difference over the vocabulary (last axis), at each place."""
    return np.sqrt(np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=-1))


def measured(clean: np.ndarray, config: ModelConfig, params: model.Params, ids: Array, *, tail: int) -> float:
    """Noise of `clean = uncached(config, params, ids, tail=tail)`: the largest `distance` that rounding makes."""
    others = [uncached(config, params, ids, tail=tail, moved=True)]
    if jax.default_backend() != "cpu":
        # A GPU may multiply float32 in TF32, and need not do so in every shape.
        with jax.default_matmul_precision("highest"):
            others.append(uncached(config, params, ids, tail=tail))
    return max(float(distance(clean, np.asarray(other)).max()) for other in others)
