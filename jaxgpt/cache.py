"""The key/value cache: per-layer buffers with heads before time, and how full each row is.

A token at position p of its row lives in slot p, so causality alone hides slots
that were never written, whatever the rows' lengths. Keys and values are separate
buffers per layer: one stacked array would keep XLA from updating in place, and
time before heads makes attention over the cache several times slower on a CPU.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig

MINIMUM_SLOTS = 64


class KVCache(NamedTuple):
    """State of a batch of sequences; passed into every cached forward and out again."""

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    lengths: Int[Array, "B"]
    """Tokens stored in each row."""

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.keys[0].shape[2]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config: ModelConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """A cache of zeros for `batch` rows of `slots` tokens, in the compute dtype; one program for all its buffers."""
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def nothing_said(cache: KVCache) -> Int[Array, "B S"]:
    """Room for the id of each slot of this cache."""
    return jax.device_put(np.zeros((cache.lengths.shape[0], cache.slots), np.int32))


def written(
    said: Int[Array, "B S"], lengths: Int[Array, "B"], ids: Int[Array, "B T"], counts: Int[Array, "B"]
) -> Int[Array, "B S"]:
    """The first `counts[b]` of `ids[b]` in the slots from `lengths[b]` on, where the cache stores them too."""
    offsets = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where(offsets < counts[:, None], lengths[:, None] + offsets, said.shape[1])
    return said.at[jnp.arange(len(said))[:, None], slots].set(ids, mode="drop")


def bucket(tokens: int, minimum: int = MINIMUM_SLOTS) -> int:
    """The power of two, at least `minimum`, that holds `tokens`: few shapes, few compilations."""
    return max(minimum, 1 << max(0, tokens - 1).bit_length())


def grown(cache: KVCache, slots: int) -> KVCache:
    """The same cache with at least `slots` slots."""
    extra = slots - cache.slots
    if extra <= 0:
        return cache

    def pad(buffer: Array) -> Array:
        return jnp.pad(buffer, ((0, 0), (0, 0), (0, extra), (0, 0)))

    return KVCache(jax.tree.map(pad, cache.keys), jax.tree.map(pad, cache.values), cache.lengths)
