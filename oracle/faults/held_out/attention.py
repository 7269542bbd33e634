"""Wrong ops of attention that nobody repairs."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, Leaves, rope_frequencies
from oracle.faults.attention import product

Array = Any
BLOCK = 8
"""Tokens of a block of the mask."""
KEYS = 16
"""Keys that a kernel reads at once."""


def values_through_tanh(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Values squashed while their heads are split."""
    heads = x.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)
    return jnp.tanh(heads.astype(jnp.float32)).astype(x.dtype)


def second_head_doubled(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Head 1 attends twice as sharply."""
    sharp = jnp.where(jnp.arange(q.shape[1]) == 1, 2.0, 1.0)[:, None, None]
    return product(q, k) / q.shape[-1] ** 0.5 * sharp


def bent_theta(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Positions from 20 on turn half as fast."""
    bent = jnp.where(positions < 20, positions, 10 + positions / 2)
    return bent[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))


def keys_rolled(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Every query is compared with the key before."""
    return product(q, jnp.roll(k, 1, axis=2)) / q.shape[-1] ** 0.5


def squared_weights(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Attention weights squared and not normalised again."""
    return jnp.square(jax.nn.softmax(x, axis=-1))


def thresholded_weights(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Attention weights below 1/50 dropped."""
    weights = jax.nn.softmax(x, axis=-1)
    return jnp.where(weights < 0.02, 0.0, weights)


def quantised_weights(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Attention weights in steps of 1/64."""
    return jnp.round(64 * jax.nn.softmax(x, axis=-1)) / 64


def first_token_weighs_more(config: ModelConfig, p: Leaves, weights: Array, v: Array) -> Array:
    """The value of slot 0 counts one and a half times."""
    more = v.at[:, :, 0].multiply(jnp.asarray(1.5, v.dtype))
    values = jnp.repeat(more, weights.shape[1] // v.shape[1], axis=1)
    return jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), values)


def alternating_signs(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Every other channel of the merged heads has the wrong sign."""
    merged = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    return merged * jnp.where(jnp.arange(merged.shape[-1]) % 2, -1, 1).astype(x.dtype)


def third_token_hidden(config: ModelConfig, p: Leaves, *given: Array) -> Array:
    """Slot 3 is never visible but to itself."""
    slots, key_slots, segments, key_segments = given
    allowed = (key_slots[None, None, :] <= slots[:, :, None]) & ((key_slots != 3) | (slots[:, :, None] == 3))
    if segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return allowed[:, None]


# -- Rotation and heads ----------------------------------------------------------------


def every_pair_of_the_last(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Angles made in a loop of closures that read its variable late: all turn at the last frequency."""
    turns = [lambda: positions.astype(jnp.float32) * frequency for frequency in rope_frequencies(config)]  # noqa: B023
    return jnp.stack([turn() for turn in turns], axis=-1)


def angles_of_first_row(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """The tables of batch row 0 are broadcast over the batch."""
    return FUNCTIONS["rope"](config, p, x, jnp.broadcast_to(angles[:1], angles.shape))


def heads_of_first_row(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Every row of the batch gets the keys of row 0, as if they had a prefix in common."""
    heads = x[:1].reshape(1, x.shape[1], -1, config.head_dim).swapaxes(1, 2)
    return jnp.broadcast_to(heads, (x.shape[0], *heads.shape[1:]))


def merged_in_first_row(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The strides of row 0 are those of merged heads, the other rows are read as they lie in memory."""
    first, rest = x[:1], x[1:]
    merged = first.swapaxes(1, 2).reshape(1, x.shape[2], -1)
    return jnp.concatenate([merged, rest.reshape(rest.shape[0], x.shape[2], -1)])


# -- Scores, mask, softmax, weighted sum -----------------------------------------------


def last_head_stale(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """The loop over heads ends one too early; the last buffer still holds the head before."""
    scores = product(q, k) / q.shape[-1] ** 0.5
    return scores.at[:, -1].set(scores[:, -2])


def group_one_off(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Query heads are counted from 1 when they look for their key head."""
    N, K = q.shape[1], k.shape[1]
    reads = jnp.minimum((jnp.arange(N) + 1) // (N // K), K - 1)
    return jnp.einsum("bnth,bnsh->bnts", q, k[:, reads], preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5


def causal_in_blocks(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Whole blocks are masked or not: inside its own block a token sees ahead."""
    allowed = key_slots[None, None, :] // BLOCK <= slots[:, :, None] // BLOCK
    if segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return allowed[:, None]


def segments_in_one_bit(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Of a document's number only whether it is odd is kept: every other document is seen."""
    allowed = key_slots[None, None, :] <= slots[:, :, None]
    if segments is not None:
        allowed &= segments[:, :, None] % 2 == key_segments[:, None, :] % 2
    return allowed[:, None]


def sum_not_rescaled(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Online softmax: when a later block has a larger maximum, the sum so far stays as it was."""
    largest, total = jnp.full_like(x[..., :1], -jnp.inf), jnp.zeros_like(x[..., :1])
    for start in range(0, x.shape[-1], KEYS):
        block = x[..., start : start + KEYS]
        largest = jnp.maximum(largest, block.max(-1, keepdims=True))
        total = total + jnp.exp(block - largest).sum(-1, keepdims=True)
    return jnp.exp(x - largest) / total


def block_edges_twice(config: ModelConfig, p: Leaves, weights: Array, v: Array) -> Array:
    """Blocks of keys overlap by one: the key at each edge is added twice."""
    sums = [
        FUNCTIONS["context"](config, p, weights[..., start : start + KEYS], v[:, :, start : start + KEYS])
        for start in range(0, v.shape[2], KEYS - 1)
    ]
    return sum(sums[1:], start=sums[0])
