"""From logits to ids: pure, per row, every knob a run-time value.

Nothing here depends on a knob's value at compile time, so changing one never
recompiles. Top-k and top-p need no sort: the k-th largest logit, or the smallest
set of a given probability, is one threshold, and a threshold over float32 keys is
found exactly in 32 halvings, whatever the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

SMALLEST = 1e-30
"""Temperature below which nothing changes: any two different logits are infinitely far apart."""


class Knobs(NamedTuple):
    """Sampling settings of each row of a batch."""

    temperature: Float[Array, "B"]
    """At or below 0 the row is strictly greedy: no other knob applies."""
    top_k: Int[Array, "B"]
    """Keep the k most likely ids; 0 keeps all."""
    top_p: Float[Array, "B"]
    """Keep the most likely ids that together reach this probability; 1 keeps all."""
    seed: UInt[Array, "B"]
    """With the position, decides the draw: neighbours in the batch do not."""


def sample(
    logits: Float[Array, "B V"], sampleable: Bool[Array, "V"], knobs: Knobs, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The next id of each row, only ever one that is `sampleable`.

    `positions` is the position each id will have; together with the row's seed it
    names the random draw.
    """
    logits = jnp.where(sampleable, logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_greedy = knobs.temperature <= 0

    def draw() -> Array:
        return jnp.where(is_greedy, greedy, _sampled(logits, knobs, positions))

    return jax.lax.cond(is_greedy.all(), lambda: greedy, draw)


def _sampled(logits: Float[Array, "B V"], knobs: Knobs, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    kept = filtered(logits, knobs)
    # Around 0, so that a small temperature's huge logits do not round the noise away.
    kept = kept - kept.max(axis=-1, keepdims=True)
    return jnp.argmax(kept + _gumbel(knobs.seed, positions, logits.shape[-1]), axis=-1).astype(jnp.int32)


def _gumbel(seed: UInt[Array, "B"], positions: Int[Array, "B"], size: int) -> Float[Array, "B V"]:
    """Gumbel noise: argmax(logits + noise) draws from softmax(logits) (Maddison et al. 2014)."""

    def row(seed: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,), jnp.float32)

    return jax.vmap(row)(seed, positions)


def filtered(logits: Float[Array, "B V"], knobs: Knobs) -> Float[Array, "B V"]:
    """Logits after temperature, top-k, top-p, in transformers' order; removed ids are -inf."""
    # A greedy row is computed like any other and then not used; its divisor must not be 0,
    # and no divisor so small that two logits would both become infinite.
    divisor = jnp.where(knobs.temperature > 0, jnp.maximum(knobs.temperature, SMALLEST), 1.0)
    scaled = logits / divisor[:, None]
    size = logits.shape[-1]
    k = jnp.where((knobs.top_k <= 0) | (knobs.top_k > size), size, knobs.top_k)
    scaled = _keep(scaled, jnp.ones_like(scaled), k.astype(jnp.float32))
    # Rounded sums may reach 1 before the last id: nothing reaches infinity, so all are kept.
    return _keep(scaled, jax.nn.softmax(scaled, axis=-1), jnp.where(knobs.top_p < 1, knobs.top_p, jnp.inf))


def _keep(logits: Float[Array, "B V"], mass: Float[Array, "B V"], target: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keep the largest logits, ties together, until their mass reaches the target."""
    keys = _ordered_bits(logits)

    def halve(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(keys >= candidate[:, None], mass, 0.0), axis=-1) >= target
        return jnp.where(reached, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(logits.shape[:1], jnp.uint32))
    return jnp.where(keys >= threshold[:, None], logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the floats (negative floats' bits run backwards)."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0.0 is 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
