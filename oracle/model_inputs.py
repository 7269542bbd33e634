"""What every forward is given beside parameters, as it follows from ids, lengths and documents.

Written apart from the product's own (`jaxgpt.model`), so that a mistake there is one of
the candidate and not of what it is measured by.
"""

from typing import Any

import jax.numpy as jnp

from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig

Inputs = dict[str, Any]
"""By the names that the table of ops (`jaxgpt.taps`) reads."""


def of_sequences(ids: Any, positions: Any = None, segments: Any = None) -> Inputs:
    """Of whole sequences (B, T): every token attends by its place in the row, within its document."""
    places = jnp.tile(jnp.arange(ids.shape[1], dtype=jnp.int32), (ids.shape[0], 1))
    documents = {"segments": segments, "key_segments": segments}
    row = {"slots": places, "key_slots": places[0]}
    return {"ids": ids, "positions": places if positions is None else positions, **row, **documents}


def of_step(config: ModelConfig, ids: Any, counts: Any, cache: KVCache) -> Inputs:
    """Of a cached forward: a token's position and slot is the number of tokens before it in its row.

    Beyond `counts` (B,) the ids (B, T) are padding: its slot is outside the cache, so that nothing is stored,
    and its position any that exists.
    """
    room, number = cache.keys[0].shape[2], jnp.arange(ids.shape[1], dtype=jnp.int32)
    places = jnp.expand_dims(cache.lengths, 1) + number
    inputs: Inputs = {
        "ids": ids,
        "positions": places.clip(max=config.max_position_embeddings - 1),
        "slots": jnp.where(number < jnp.expand_dims(counts, 1), places, room),
        "key_slots": jnp.arange(room, dtype=jnp.int32),
        "segments": None,
        "key_segments": None,
    }
    for layer in range(config.num_hidden_layers):
        inputs |= {f"cache.{layer}.keys": cache.keys[layer], f"cache.{layer}.values": cache.values[layer]}
    return inputs
