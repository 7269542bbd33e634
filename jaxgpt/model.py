"""One decoder for GPT-2, Llama and Qwen2: pure ops, run in the order of `jaxgpt.taps`.

Read in this order: the ops (what is computed), `run` (how the table of ops becomes
a model), `forward` and `forward_cached` (the two ways in), `Transformer` (the same
parameters as a Flax module, which defines and initialises them).

Every op is `op(config, parameters, *inputs) -> output`. Its compute dtype is that
of the parameters it is given; norms, rotation, scores, softmax and logits are
float32 inside whatever that dtype is.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt import taps, weights
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.taps import Op, Wiring

Params = Mapping[str, Array]
"""Flat parameters under the names of `jaxgpt.weights`."""
Leaves = Mapping[str, Array]
"""One module's parameters: `weight`, `kernel`, `bias`."""
OpFunction = Callable[..., Array]

MASKED = float(jnp.finfo(jnp.float32).min)
"""Score of a position that may not be attended to; finite, so that no row is NaN."""

# -- Embedding -------------------------------------------------------------------------


def embed(config: ModelConfig, p: Leaves, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding. An id outside it gives NaN, never another token's row."""
    return p["weight"].at[ids].get(mode="fill", fill_value=jnp.nan)


def angles(config: ModelConfig, p: Leaves, positions: Int[Array, "B T"]) -> Float[Array, "B T R"]:
    """RoPE angles, position times frequency, R = H / 2 (Su et al. 2021, eq. 15)."""
    return positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config), jnp.float32)


def rope_frequencies(config: ModelConfig) -> list[float]:
    """H / 2 angular frequencies, after linear or llama3 scaling (transformers' modeling_rope_utils)."""
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return [f / scaling.factor for f in plain]
    return [_llama3_frequency(f, config) for f in plain]


def _llama3_frequency(frequency: float, config: ModelConfig) -> float:
    """Fast frequencies stay, slow ones are divided, those between are blended (Llama 3.1)."""
    s = config.rope_scaling
    assert s is not None
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = min(max(blend, 0.0), 1.0)
    return (1 - blend) * frequency / s.factor + blend * frequency


def attention_mask(
    config: ModelConfig,
    p: Leaves,
    slots: Int[Array, "B T"],
    key_slots: Int[Array, "S"],
    segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
) -> Bool[Array, "B 1 T S"]:
    """True where a token may attend: not to a later slot, nor to another document."""
    allowed = key_slots[None, None, :] <= slots[:, :, None]
    if segments is not None and key_segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return allowed[:, None]


# -- Norms and projections -------------------------------------------------------------


def norm(config: ModelConfig, p: Leaves, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), in float32."""
    wide = x.astype(jnp.float32)
    if config.norm == "layernorm":
        wide = wide - wide.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.rms_norm_eps)
    wide = wide * scale * p["weight"].astype(jnp.float32)
    if "bias" in p:
        wide = wide + p["bias"].astype(jnp.float32)
    return wide.astype(x.dtype)


def projection(config: ModelConfig, p: Leaves, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """x @ kernel + bias; the kernel is (in, out)."""
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def head(config: ModelConfig, p: Leaves, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits in float32; `weight` is (V, D), so a tied head is the embedding itself."""
    return jnp.einsum("btd,vd->btv", x, p["weight"], preferred_element_type=jnp.float32)


# -- Attention -------------------------------------------------------------------------


def _split_heads(x: Float[Array, "B T O"], heads: int) -> Float[Array, "B N T H"]:
    batch, time, _ = x.shape
    return x.reshape(batch, time, heads, -1).swapaxes(1, 2)


def split_query_heads(config: ModelConfig, p: Leaves, x: Float[Array, "B T O"]) -> Float[Array, "B N T H"]:
    """(B, T, N·H) to (B, N, T, H)."""
    return _split_heads(x, config.num_attention_heads)


def split_kv_heads(config: ModelConfig, p: Leaves, x: Float[Array, "B T O"]) -> Float[Array, "B K T H"]:
    """(B, T, K·H) to (B, K, T, H)."""
    return _split_heads(x, config.num_key_value_heads)


def rope(
    config: ModelConfig, p: Leaves, x: Float[Array, "B N T H"], angles: Float[Array, "B T R"]
) -> Float[Array, "B N T H"]:
    """Rotate pairs (i, i + H/2): the half-split convention of Hugging Face, not the interleaved one."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def store(
    config: ModelConfig,
    p: Leaves,
    new: Float[Array, "B K T H"],
    buffer: Float[Array, "B K S H"],
    slots: Int[Array, "B T"],
) -> Float[Array, "B K S H"]:
    """Write each row's new keys or values into its slots; a slot outside the buffer is dropped."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    # Advanced indices around a slice put B and T first: (B, T, K, H).
    return buffer.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop")


def scores(
    config: ModelConfig, p: Leaves, q: Float[Array, "B N T H"], k: Float[Array, "B K S H"]
) -> Float[Array, "B N T S"]:
    """q·k / sqrt(H) in float32 (Vaswani et al. 2017, eq. 1); query head n reads kv head n // (N // K)."""
    batch, heads, time, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, time, width)  # (B, K, N/K, T, H)
    product = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return product.reshape(batch, heads, time, -1) * width**-0.5


def mask(
    config: ModelConfig, p: Leaves, scores: Float[Array, "B N T S"], allowed: Bool[Array, "B 1 T S"]
) -> Float[Array, "B N T S"]:
    """Scores, with MASKED where attention is not allowed."""
    return jnp.where(allowed, scores, MASKED)


def softmax(config: ModelConfig, p: Leaves, x: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """Attention weights in float32."""
    return jax.nn.softmax(x, axis=-1)


def context(
    config: ModelConfig, p: Leaves, weights: Float[Array, "B N T S"], v: Float[Array, "B K S H"]
) -> Float[Array, "B N T H"]:
    """Weighted sum of the values, in their dtype."""
    batch, heads, time, source = weights.shape
    grouped = weights.astype(v.dtype).reshape(batch, v.shape[1], -1, time, source)  # (B, K, N/K, T, S)
    return jnp.einsum("bkgts,bksh->bkgth", grouped, v).reshape(batch, heads, time, -1)


def fused_attention(
    config: ModelConfig,
    p: Leaves,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    allowed: Bool[Array, "B 1 T S"],
) -> Float[Array, "B N T H"]:
    """scores, mask, softmax and context in one cuDNN kernel (bf16/fp16 on a GPU)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # the kernel wants (B, T, N, H)
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation="cudnn").swapaxes(1, 2)


def merge_heads(config: ModelConfig, p: Leaves, x: Float[Array, "B N T H"]) -> Float[Array, "B T O"]:
    """(B, N, T, H) to (B, T, N·H)."""
    batch, _, time, _ = x.shape
    return x.swapaxes(1, 2).reshape(batch, time, -1)


# -- MLP and residual stream -----------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


def activation(config: ModelConfig, p: Leaves, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """GELU, tanh or exact (Hendrycks & Gimpel 2016), or SiLU; in float32."""
    return _ACTIVATIONS[config.hidden_act](x.astype(jnp.float32)).astype(x.dtype)


def gated_activation(
    config: ModelConfig, p: Leaves, gate: Float[Array, "B T F"], up: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """act(gate) * up: SwiGLU (Shazeer 2020) when the activation is SiLU."""
    return activation(config, p, gate) * up


def add(config: ModelConfig, p: Leaves, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream plus a branch."""
    return x + y


def _dropout(rate_field: str) -> OpFunction:
    def dropout(config: ModelConfig, p: Leaves, x: Float[Array, "*S"], rng: Key[Array, ""]) -> Float[Array, "*S"]:
        """Zero entries with the config's rate and scale the rest up (Srivastava et al. 2014)."""
        keep = 1.0 - getattr(config, rate_field)
        return jnp.where(jax.random.bernoulli(rng, keep, x.shape), x / keep, 0).astype(x.dtype)

    return dropout


FUNCTIONS: Mapping[str, OpFunction] = {
    "embed": embed,
    "angles": angles,
    "attention_mask": attention_mask,
    "norm": norm,
    "projection": projection,
    "split_query_heads": split_query_heads,
    "split_kv_heads": split_kv_heads,
    "rope": rope,
    "store": store,
    "scores": scores,
    "mask": mask,
    "softmax": softmax,
    "context": context,
    "fused_attention": fused_attention,
    "merge_heads": merge_heads,
    "activation": activation,
    "gated_activation": gated_activation,
    "add": add,
    "head": head,
    "embedding_dropout": _dropout("embd_pdrop"),
    "attention_dropout": _dropout("attn_pdrop"),
    "residual_dropout": _dropout("resid_pdrop"),
}
"""The ops by the name the table gives them."""

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
        replace: ops to run instead of ours; feed: values to put in place of taps.
    """
    rates = config.embd_pdrop + config.attn_pdrop + config.resid_pdrop
    wiring = Wiring(dropout=rng is not None and rates > 0, fused_attention=fused_attention)
    values = uncached_inputs(ids, positions, segments) | ({"rng": rng} if wiring.dropout else {})
    if remat:
        return _forward_remat(config, params, values, wiring)
    ops = taps.ops(config, wiring)
    values = run(config, params, ops, values, replace=replace, feed=feed)
    return Output(values["logits"], {op.tap: values[op.tap] for op in ops})


def _forward_remat(config: ModelConfig, params: Params, values: Values, wiring: Wiring) -> Output:
    values = run(config, params, tuple(taps.embedding_ops(config, wiring)), values)
    for layer in range(config.num_hidden_layers):
        ops = tuple(taps.layer_ops(config, layer, wiring))
        own = {name: array for name, array in params.items() if name.startswith(f"layers.{layer}.")}
        values[ops[-1].tap] = jax.checkpoint(partial(_layer, config, ops))(own, _layer_inputs(values, ops, layer))
    values = run(config, params, tuple(taps.head_ops(config)), values)
    return Output(values["logits"], {})


def _layer_inputs(values: Values, ops: tuple[Op, ...], layer: int) -> Values:
    computed = {op.tap for op in ops}
    needed = {name for op in ops for name in op.inputs} - computed
    inputs = {name: values[name] for name in needed}
    if "rng" in inputs:
        inputs["rng"] = jax.random.fold_in(inputs["rng"], layer)
    return inputs


def _layer(config: ModelConfig, ops: tuple[Op, ...], params: Params, values: Values) -> Array:
    return run(config, params, ops, values)[ops[-1].tap]


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


# -- Parameters as a Flax module -------------------------------------------------------


class Module(nnx.Module):
    """Parameters of one op or a group of them, initialised as GPT-2's: normal, ones, zeros."""

    def add(self, name: str, shape: tuple[int, ...], scale: float, rngs: nnx.Rngs) -> None:
        """Define the parameter `name`, below this module."""
        head, _, rest = name.partition(".")
        if rest:
            if not hasattr(self, head):
                setattr(self, head, Module())
            getattr(self, head).add(rest, shape, scale, rngs)
        elif head == "bias":
            self.bias = nnx.Param(jnp.zeros(shape))
        elif len(shape) == 1:
            self.weight = nnx.Param(jnp.ones(shape))
        else:
            setattr(self, head, nnx.Param(scale * jax.random.normal(rngs.params(), shape)))


class Transformer(Module):
    """The model as a Flax NNX module: `Transformer(config, nnx.Rngs(0))(ids)` gives logits.

    Its parameters are those of the name table, in float32. The rest of jaxgpt uses
    it to define and initialise them and then works on the flat dict of `params`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        for parameter in weights.parameters(config):
            self.add(parameter.name, parameter.shape, _initial_scale(config, parameter.name), rngs)

    def params(self) -> dict[str, Array]:
        """Flat parameters under the table's names."""
        flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {".".join(map(str, path)): variable[...] for path, variable in flat}

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of whole sequences, dropout off."""
        return forward(self.config, self.params(), ids).logits


def _initial_scale(config: ModelConfig, name: str) -> float:
    # Each of the 2L residual branches adds variance to the stream (GPT-2 report, section 2.3).
    ends_branch = name.endswith(("attn.out.kernel", "mlp.down.kernel"))
    return config.initializer_range * ((2 * config.num_hidden_layers) ** -0.5 if ends_branch else 1.0)


def init(config: ModelConfig, seed: int) -> dict[str, Array]:
    """Fresh float32 parameters."""
    return jax.jit(lambda: Transformer(config, nnx.Rngs(seed)).params())()


def cast(params: Params, dtype: Any) -> dict[str, Array]:
    """Every parameter in another dtype: the compute dtype of the ops that read it."""
    return {name: jnp.asarray(array, dtype) for name, array in params.items()}
