"""Wrong cached forwards: positions, slots, masks and what the cache holds. They must show in the rung decode."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op, Wiring
from oracle.candidate import Candidate, Step
from oracle.faults.fault import Plant
from oracle.faults.wiring import Rewire, run_cached, table_of, untouched

Array = Any
Inputs = Callable[[ModelConfig, model.Values, Array, KVCache], model.Values]
"""(config, right inputs, counts, cache) to the inputs of a cached forward."""
After = Callable[[KVCache, KVCache, Array, int], KVCache]
"""(cache before, cache after, counts, width of the ids) to the cache that is kept."""
RING = 16
"""Slots of a ring buffer that is too small."""
FIRST_BUCKET = 64


def stepping(step: Step) -> Plant:
    """Another cached forward."""
    return lambda candidate: replace(candidate, step=step)


def fed(inputs: Inputs, change: Rewire = untouched) -> Plant:
    """A cached forward with other inputs."""
    return stepping(_fed(inputs, change))


@cache
def _fed(inputs: Inputs, change: Rewire) -> Step:
    def step(
        config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
    ) -> tuple[model.Output, KVCache]:
        values = inputs(config, model.cached_inputs(config, ids, counts, cache), counts, cache)
        table = table_of(config, Wiring(cached=True), change)
        return run_cached(config, params, table, values, cache, counts, given)

    return step


def kept(after: After) -> Plant:
    """A right cached forward, after which the cache is treated wrongly."""
    return stepping(_kept(after))


@cache
def _kept(after: After) -> Step:
    def step(
        config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
    ) -> tuple[model.Output, KVCache]:
        output, right = model.forward_cached(config, params, ids, counts, cache, **given)
        return output, after(cache, right, counts, ids.shape[1])

    return step


def with_op(function: str, wrong: OpFunction) -> Plant:
    """An op that is wrong in cached forwards only."""
    return stepping(_with_op(function, wrong))


@cache
def _with_op(function: str, wrong: OpFunction) -> Step:
    def step(
        config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
    ) -> tuple[model.Output, KVCache]:
        given["replace"] = {function: wrong, **given.get("replace", {})}
        return model.forward_cached(config, params, ids, counts, cache, **given)

    return step


# -- Positions -------------------------------------------------------------------------


def offset_by_one(
    config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
) -> tuple[model.Output, KVCache]:
    """Every forward of one token believes that one token more is stored."""
    shifted = cache._replace(lengths=cache.lengths + (ids.shape[1] == 1))
    output, after = model.forward_cached(config, params, ids, counts, shifted, **given)
    return output, after._replace(lengths=cache.lengths + counts)


def _bounded(config: ModelConfig, positions: Array) -> Array:
    return jnp.clip(positions, 0, config.max_position_embeddings - 1)


def _columns(values: model.Values) -> Array:
    return jnp.broadcast_to(jnp.arange(values["ids"].shape[1], dtype=jnp.int32), values["ids"].shape)


def restarting(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    """Positions begin at 0 in every forward."""
    return values | {"positions": _columns(values)}


def one_behind(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    """A new token takes the position of the token before it; its slot is right."""
    behind = values["positions"] - (cache.lengths > 0)[:, None].astype(jnp.int32)
    return values | {"positions": _bounded(config, behind)}


def left_padded(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    """Positions of the prefill are columns of a left-padded batch: padding is counted."""
    width = values["ids"].shape[1]
    shift = jnp.where(cache.lengths == 0, width - counts, 0)[:, None]
    return values | {"positions": _bounded(config, values["positions"] + shift)}


def of_longest_row(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    """One position for the whole batch: that of its longest row."""
    return values | {"positions": _bounded(config, _columns(values) + cache.lengths.max())}


# -- Length ----------------------------------------------------------------------------


def not_advanced(before: KVCache, after: KVCache, counts: Array, width: int) -> KVCache:
    """The prefill sets the length, and no step adds to it."""
    return after._replace(lengths=before.lengths + counts * (before.lengths == 0))


def padding_counted(before: KVCache, after: KVCache, counts: Array, width: int) -> KVCache:
    """Every row is taken to be as long as the longest."""
    return after._replace(lengths=before.lengths + width)


# -- Slots -----------------------------------------------------------------------------


def _to_slots(config: ModelConfig, op: Op) -> Op:
    if op.function != "store":
        return op
    return replace(op, inputs=(*op.inputs[:2], "store_slots"))


def _slot_before(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    return values | {"store_slots": values["slots"] - (cache.lengths > 0)[:, None].astype(jnp.int32)}


def _ring(config: ModelConfig, values: model.Values, counts: Array, cache: KVCache) -> model.Values:
    slots = values["slots"]
    return values | {"store_slots": jnp.where(slots < cache.slots, slots % RING, slots)}


overwrites_last = fed(_slot_before, _to_slots)
"""A new token is stored over the one before it; its own slot stays stale."""
ring_too_small = fed(_ring, _to_slots)
"""Slots are counted modulo a window that the model does not have."""


def never_written(config: ModelConfig, p: Leaves, new: Array, buffer: Array, slots: Array) -> Array:
    """Steps do not store: the slot keeps what it held."""
    if new.shape[2] == 1:
        return buffer
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop")


def forgets_last_slot(
    config: ModelConfig, params: model.Params, ids: Array, counts: Array, cache: KVCache, **given: Any
) -> tuple[model.Output, KVCache]:
    """Growing the buffer copies one slot too few."""
    if cache.slots > FIRST_BUCKET:
        last = FIRST_BUCKET - 1
        cache = cache._replace(
            keys=tuple(keys.at[:, :, last].set(0) for keys in cache.keys),
            values=tuple(values.at[:, :, last].set(0) for values in cache.values),
        )
    return model.forward_cached(config, params, ids, counts, cache, **given)


# -- What is stored --------------------------------------------------------------------


def _store(new: Array, buffer: Array, slots: Array) -> Array:
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], :, slots].set(new.swapaxes(1, 2), mode="drop")


def in_bfloat16(config: ModelConfig, p: Leaves, new: Array, buffer: Array, slots: Array) -> Array:
    """A cache of half the width."""
    return _store(new.astype(jnp.bfloat16).astype(new.dtype), buffer, slots)


def in_float8(config: ModelConfig, p: Leaves, new: Array, buffer: Array, slots: Array) -> Array:
    """A cache of 8 bits (e4m3)."""
    return _store(new.astype(jnp.float8_e4m3fn).astype(new.dtype), buffer, slots)


def too_narrow(candidate: Candidate) -> Candidate:
    """The next narrower dtype than the model's."""
    store = in_bfloat16 if candidate.dtype == "float32" else in_float8
    return replace(candidate, replace={**candidate.replace, "store": store})


def keys_as_values(config: ModelConfig, op: Op) -> Op:
    """The values' buffer is given the keys."""
    if op.function != "store" or not op.tap.endswith(".values"):
        return op
    key = "k_rope" if config.position_embedding == "rope" else "k_heads"
    return replace(op, inputs=(op.inputs[0].replace("v_heads", key), *op.inputs[1:]))


def keys_before_rotation(config: ModelConfig, op: Op) -> Op:
    """The keys are stored as they were before RoPE."""
    if op.function != "store" or not op.tap.endswith(".keys"):
        return op
    return replace(op, inputs=(op.inputs[0].replace("k_rope", "k_heads"), *op.inputs[1:]))


def rows_mixed(before: KVCache, after: KVCache, counts: Array, width: int) -> KVCache:
    """After the prefill each row's keys and values lie in its neighbour's, as after a wrong beam reordering."""
    fresh = (before.lengths == 0)[:, None, None, None]
    mix = [jnp.where(fresh, jnp.roll(buffer, 1, axis=0), buffer) for buffer in (*after.keys, *after.values)]
    layers = len(after.keys)
    return after._replace(keys=tuple(mix[:layers]), values=tuple(mix[layers:]))


# -- Ops in cached forwards ------------------------------------------------------------


def sees_padding(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Every row may attend to as many slots as the longest."""
    padding = slots >= key_slots.shape[0]
    longest = jnp.where(padding, -1, slots).max(axis=0)[None, :, None]
    return jnp.broadcast_to(key_slots[None, None, :] <= longest, (*slots.shape, key_slots.shape[0]))[:, None]


def prefill_not_causal(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A prompt's tokens see the whole prompt (a prefix LM)."""
    longest = jnp.where(slots >= key_slots.shape[0], -1, slots).max(axis=1)[:, None, None]
    return jnp.broadcast_to(key_slots[None, None, :] <= longest, (*slots.shape, key_slots.shape[0]))[:, None]


def step_blind_to_itself(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A step sees what was stored before it, and not its own token."""
    own = 1 if slots.shape[1] == 1 else 0
    return (key_slots[None, None, :] <= slots[:, :, None] - own)[:, None]
