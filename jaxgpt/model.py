"""One decoder for GPT-2, Llama, Mistral and Qwen: the ops of `jaxgpt.ops`, in the order of `jaxgpt.taps`.

Read in this order: `run` (how the table of ops becomes a model), `forward` and
`forward_cached` (the two ways in). `jaxgpt.transformer` defines and initialises the
parameters.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgpt import taps
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, OpFunction
from jaxgpt.taps import Op, Wiring

Params = Mapping[str, Array]
"""Flat parameters under the names of `jaxgpt.weights`."""
# -- From table to model ---------------------------------------------------------------

Values = dict[str, Any]
"""Taps and inputs by name."""
Replacements = Mapping[str, OpFunction]
"""Ops to run instead, by tap (`layers.3.attn.scores`) or by function (`scores`)."""
UNCHANGED: Mapping[str, Any] = MappingProxyType({})


def leaves(params: Params, module: str) -> dict[str, Array]:
    """The parameters of one module: `{"kernel": …, "bias": …}`."""
    return {name: params[f"{module}.{name}"] for name in ("weight", "kernel", "bias") if f"{module}.{name}" in params}


def run_op(config: ModelConfig, params: Params, op: Op, inputs: list[Any], replace: Replacements = UNCHANGED) -> Array:
    """One op on given inputs: what the oracle feeds with the reference's activations."""
    function = replace.get(op.tap) or replace.get(op.function) or FUNCTIONS[op.function]
    return function(config, leaves(params, op.parameters) if op.parameters else {}, *inputs)


def run(
    config: ModelConfig,
    params: Params,
    ops: tuple[Op, ...],
    values: Values,
    *,
    replace: Replacements = UNCHANGED,
    feed: Mapping[str, Array] = UNCHANGED,
) -> Values:
    """Run ops in order on `values` (model inputs and earlier taps); returns `values` with every tap.

    `feed` overrides the taps it names after they were computed. Every tap is a
    plain return value: under `jit` those nobody uses cost nothing.
    """
    values = dict(values)
    for position, op in enumerate(ops):
        inputs = [_input(values, name, position) for name in op.inputs]
        computed = run_op(config, params, op, inputs, replace)
        values[op.tap] = feed.get(op.tap, computed)
    return values


def _input(values: Values, name: str, position: int) -> Any:
    # Each dropout draws from its own stream: its position in the table.
    return jax.random.fold_in(values["rng"], position) if name == "rng" else values[name]


class Output(NamedTuple):
    """What a forward gives back."""

    logits: Float[Array, "B T V"]
    taps: dict[str, Array]
    """Every op's output by tap name, in execution order."""


ForwardPass = Callable[..., Output]
"""Signature of `forward`."""


def uncached_inputs(
    ids: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None, segments: Int[Array, "B T"] | None = None
) -> Values:
    """Model inputs of a forward without a cache."""
    slots = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return {
        "ids": ids,
        "positions": slots if positions is None else positions,
        "slots": slots,
        "key_slots": slots[0],
        "segments": segments,
        "key_segments": segments,
    }


def forward(
    config: ModelConfig,
    params: Params,
    ids: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    rng: Key[Array, ""] | None = None,
    remat: bool = False,
    fused_attention: bool = False,
    replace: Replacements = UNCHANGED,
    feed: Mapping[str, Array] = UNCHANGED,
) -> Output:
    """Logits and taps of whole sequences.

    Args:
        ids: token ids in [0, V); an id outside gives NaN.
        positions: what the position embedding or RoPE sees; 0, 1, 2, … by default.
        segments: document number of each token; attention stays inside a document.
        rng: turns dropout on (training).
        remat: recompute each layer's activations in the backward pass; taps of layers are then not returned.
        fused_attention: use the fused kernel; see `taps.INTERNAL_TO_FUSED_ATTENTION`.
        replace: ops to run instead of ours; feed: values to put in place of taps, not with remat.
    """
    rates = config.embd_pdrop + config.attn_pdrop + config.resid_pdrop
    wiring = Wiring(dropout=rng is not None and rates > 0, fused_attention=fused_attention)
    values = uncached_inputs(ids, positions, segments) | ({"rng": rng} if wiring.dropout else {})
    if remat:
        return _forward_remat(config, params, values, wiring, replace)
    ops = taps.ops(config, wiring)
    values = run(config, params, ops, values, replace=replace, feed=feed)
    return Output(values["logits"], {op.tap: values[op.tap] for op in ops})


def _forward_remat(
    config: ModelConfig, params: Params, values: Values, wiring: Wiring, replace: Replacements
) -> Output:
    values = run(config, params, tuple(taps.embedding_ops(config, wiring)), values, replace=replace)
    for layer in range(config.num_hidden_layers):
        ops = tuple(taps.layer_ops(config, layer, wiring))
        own = {name: array for name, array in params.items() if name.startswith(f"layers.{layer}.")}
        run_layer = jax.checkpoint(partial(_layer, config, ops, replace))
        values[ops[-1].tap] = run_layer(own, _layer_inputs(values, ops, layer))
    values = run(config, params, tuple(taps.head_ops(config)), values, replace=replace)
    return Output(values["logits"], {})


def _layer_inputs(values: Values, ops: tuple[Op, ...], layer: int) -> Values:
    computed = {op.tap for op in ops}
    needed = {name for op in ops for name in op.inputs} - computed
    inputs = {name: values[name] for name in needed}
    if "rng" in inputs:
        inputs["rng"] = jax.random.fold_in(inputs["rng"], layer)
    return inputs


def _layer(config: ModelConfig, ops: tuple[Op, ...], replace: Replacements, params: Params, values: Values) -> Array:
    return run(config, params, ops, values, replace=replace)[ops[-1].tap]


def cached_inputs(config: ModelConfig, ids: Int[Array, "B T"], counts: Int[Array, "B"], cache: KVCache) -> Values:
    """Model inputs of a forward that continues `cache` by `counts` tokens a row."""
    offsets = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    slots = cache.lengths[:, None] + offsets
    padding = offsets >= counts[:, None]
    values: Values = {
        "ids": ids,
        # Padding computes something finite that nobody reads, and is never stored.
        "positions": jnp.minimum(slots, config.max_position_embeddings - 1),
        "slots": jnp.where(padding, cache.slots, slots),
        "key_slots": jnp.arange(cache.slots, dtype=jnp.int32),
        "segments": None,
        "key_segments": None,
    }
    for layer, (keys, store_values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        values[f"cache.{layer}.keys"] = keys
        values[f"cache.{layer}.values"] = store_values
    return values


def forward_cached(
    config: ModelConfig,
    params: Params,
    ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: KVCache,
    *,
    last_only: bool = False,
    replace: Replacements = UNCHANGED,
    feed: Mapping[str, Array] = UNCHANGED,
) -> tuple[Output, KVCache]:
    """Continue each row of the cache with the first `counts[b]` tokens of `ids[b]`; the rest is padding.

    The caller sees to it that `cache.lengths + counts <= cache.slots` and stays
    inside the context; logits at padding are meaningless. With `last_only` the
    logits are (B, 1, V), of each row's last real token: a long prompt's other
    logits would take more memory than the model.
    """
    ops = taps.ops(config, Wiring(cached=True))
    values = cached_inputs(config, ids, counts, cache)
    values = run(config, params, ops[:-1], values, replace=replace, feed=feed)
    if last_only:
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        values["final_norm"] = jnp.take_along_axis(values["final_norm"], last, axis=1)
    values = run(config, params, ops[-1:], values, replace=replace, feed=feed)
    layers = range(config.num_hidden_layers)
    cache = KVCache(
        keys=tuple(values[f"layers.{i}.attn.keys"] for i in layers),
        values=tuple(values[f"layers.{i}.attn.values"] for i in layers),
        lengths=cache.lengths + counts,
    )
    return Output(values["logits"], {op.tap: values[op.tap] for op in ops}), cache


def cast(params: Mapping[str, Any], dtype: Any) -> dict[str, Array]:
    """Every parameter in another dtype: the compute dtype of the ops that read it."""
    return {name: jnp.asarray(array, dtype) for name, array in params.items()}


def turned(params: Params) -> Params:
    """Every projection's `kernel` (in, out) as a `weight` (out, in): copies, which `ops.projection` takes as well.

    For several rows XLA's CPU (YNNPACK) multiplies weight @ rows.T up to twice as fast as rows @ kernel.
    """
    names = {name: name.removesuffix("kernel") + "weight" for name in params if name.endswith(".kernel")}
    copies = {names.get(name, name): array.T if name in names else array for name, array in params.items()}
    # Or XLA would take each transposition to where its result is read.
    return jax.lax.optimization_barrier(copies)
