"""Wrong cached forwards that nobody repairs."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, Leaves, rope_frequencies
from jaxgpt.taps import Op
from oracle.faults.decoding import fed

Array = Any
CHUNK = 8
"""Tokens of a prompt that are computed at once."""


def forgets_every_fourth(before: KVCache, after: KVCache, counts: Array, width: int) -> KVCache:
    """After the prefill every fourth slot is empty."""
    empty = (jnp.arange(after.slots) % 4 == 2)[None, None, :, None] & (before.lengths == 0)[:, None, None, None]
    blank = [jnp.where(empty, 0, buffer).astype(buffer.dtype) for buffer in (*after.keys, *after.values)]
    layers = len(after.keys)
    return after._replace(keys=tuple(blank[:layers]), values=tuple(blank[layers:]))


def odd_rows_wait(
    config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
) -> tuple[model.Output, KVCache]:
    """In odd rows, steps at an odd length believe in two tokens fewer."""
    odd = (jnp.arange(ids.shape[0]) % 2 == 1) & (cache.lengths % 2 == 1) & (cache.lengths > 2)
    output, after = model.forward_cached(
        config, params, ids, counts, cache._replace(lengths=cache.lengths - 2 * odd), **given
    )
    return output, after._replace(lengths=cache.lengths + counts)


# -- What the cache holds --------------------------------------------------------------


def last_layer_for_all(before: KVCache, after: KVCache, counts: Array, width: int) -> KVCache:
    """Every layer's buffer is the last layer's: one variable held them all."""
    layers = len(after.keys)
    return after._replace(keys=after.keys[-1:] * layers, values=after.values[-1:] * layers)


def _to_own_slots(config: ModelConfig, op: Op) -> Op:
    return replace(op, inputs=(*op.inputs[:2], "store_slots")) if op.function == "store" else op


def _slot_of_first_row(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    slots = values["slots"]
    first = jnp.broadcast_to(slots[:1], slots.shape) if slots.shape[1] == 1 else slots
    return values | {"store_slots": first}


stored_by_first_row = fed(_slot_of_first_row, _to_own_slots)
"""A step stores every row's key and value in the slot of row 0: the index of the update is one number."""


def first_head_stored(config: ModelConfig, p: Leaves, new: Array, buffer: Array, slots: Array) -> Array:
    """A step stores its first head; the others keep what their slot held."""
    stored = FUNCTIONS["store"](config, p, new, buffer, slots)
    return stored if new.shape[2] > 1 else buffer.at[:, :1].set(stored[:, :1])


def keys_turned_on(
    config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
) -> tuple[model.Output, KVCache]:
    """Every step rotates the keys that are stored by one position more."""
    one = jnp.where(cache.lengths > 0, 1.0, 0.0)[:, None, None] * jnp.asarray(rope_frequencies(config), jnp.float32)
    turned = tuple(FUNCTIONS["rope"](config, {}, keys, one) for keys in cache.keys)
    return model.forward_cached(config, params, ids, counts, cache._replace(keys=turned), **given)


# -- What a step sees ------------------------------------------------------------------


def sees_as_far_as_the_shortest(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A step's mask is as long as the batch's shortest row."""
    ends = slots.min(axis=0, keepdims=True) if slots.shape[1] == 1 else slots
    allowed = key_slots[None, None, :] <= ends[:, :, None]
    return jnp.broadcast_to(allowed, (*slots.shape, key_slots.shape[0]))[:, None]


def chunks_apart(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A prompt is computed in chunks, which do not see the chunks before."""
    allowed = key_slots[None, None, :] <= slots[:, :, None]
    if slots.shape[1] > 1:
        allowed &= key_slots[None, None, :] // CHUNK == slots[:, :, None] // CHUNK
    return allowed[:, None]
