"""The ops of the decoder: pure functions from parameters and inputs to one output.

Every op is `op(config, parameters, *inputs) -> output`. Its compute dtype is that
of the parameters and inputs it is given; norms, rotation, scores, softmax,
activations and logits are float32 inside whatever that dtype is. `FUNCTIONS` maps
the names that the table of `jaxgpt.taps` uses to these functions.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import ModelConfig
from jaxgpt.rope_scaling import RopeScaling

Leaves = Mapping[str, Array]
"""One module's parameters: `weight`, `kernel`, `bias`."""
OpFunction = Callable[..., Array]

MASKED = float(jnp.finfo(jnp.float32).min)
"""Score of a position that may not be attended to; finite, so that no row is NaN."""

# -- Embedding -------------------------------------------------------------------------


def embed(config: ModelConfig, p: Leaves, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding. An id outside it gives NaN, never another token's row."""
    return p["weight"].at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def angles(config: ModelConfig, p: Leaves, positions: Int[Array, "B T"]) -> Float[Array, "B T R"]:
    """RoPE angles, position times frequency, R = H / 2 (Su et al. 2021, eq. 15)."""
    return positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config), jnp.float32)


def rope_frequencies(config: ModelConfig) -> list[float]:
    """H / 2 angular frequencies, after the config's scaling (transformers' modeling_rope_utils)."""
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return [f / scaling.factor for f in plain]
    if scaling.rope_type == "llama3":
        return [_llama3_frequency(f, scaling) for f in plain]
    begin, end = _yarn_range(config, scaling)
    shares = [min(max((i - begin) / (end - begin), 0.0), 1.0) for i in range(half)]
    return [(1 - share) * f + share * f / scaling.factor for f, share in zip(plain, shares, strict=True)]


def _llama3_frequency(frequency: float, s: RopeScaling) -> float:
    """Fast frequencies stay, slow ones are divided, those between are blended (Llama 3.1)."""
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = min(max(blend, 0.0), 1.0)
    return (1 - blend) * frequency / s.factor + blend * frequency


def _yarn_range(config: ModelConfig, s: RopeScaling) -> tuple[float, float]:
    """The pairs between which yarn goes over from plain to divided frequencies (Peng et al. 2023, section 3.2)."""

    def pair(turns: float) -> float:
        """Which pair turns so often in the old context, as a real number."""
        reach = math.log(s.original_max_position_embeddings / (turns * 2 * math.pi))
        return config.head_dim * reach / (2 * math.log(config.rope_theta))

    begin, end = pair(float(s.beta_fast)), pair(float(s.beta_slow))
    if s.truncate:
        begin, end = float(math.floor(begin)), float(math.ceil(end))
    begin, end = max(begin, 0.0), min(end, config.head_dim - 1.0)
    # A ramp of no length is a step, as transformers has it.
    return begin, end if begin != end else end + 0.001


def attention_mask(
    config: ModelConfig,
    p: Leaves,
    slots: Int[Array, "B T"],
    key_slots: Int[Array, "S"],
    segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
) -> Bool[Array, "B 1 T S"]:
    """True where a token may attend: not to a later slot, another document or one before its window."""
    allowed = key_slots[None, None, :] <= slots[:, :, None]
    if config.sliding_window is not None:
        allowed &= key_slots[None, None, :] > slots[:, :, None] - config.sliding_window
    if segments is not None and key_segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return allowed[:, None]


# -- Norms and projections -------------------------------------------------------------


def norm(config: ModelConfig, p: Leaves, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) of the stream or of each head, in float32."""
    wide = x.astype(jnp.float32)
    if config.norm == "layernorm":
        wide = wide - wide.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.rms_norm_eps)
    wide = wide * scale * p["weight"].astype(jnp.float32)
    if "bias" in p:
        wide = wide + p["bias"].astype(jnp.float32)
    return wide.astype(x.dtype)


def projection(config: ModelConfig, p: Leaves, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """x @ kernel + bias; the kernel is (in, out), or a `weight` that is (out, in), see `model.turned`."""
    y = x @ p["kernel"] if "kernel" in p else _by_weight(p["weight"], x)
    return y + p["bias"] if "bias" in p else y


def _by_weight(weight: Float[Array, "O I"], x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(weight, rows, (((1,), (1,)), ((), ())))  # (O, B·T)
    # Left to itself XLA makes rows @ weight.T of it, which is no faster than rows @ kernel.
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


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
    """Rotate pairs (i, i + H/2): the half-split convention of Hugging Face, not the interleaved one.

    yarn lengthens what it rotates by `RopeScaling.magnitude`.
    """
    magnitude = config.rope_scaling.magnitude if config.rope_scaling else 1.0
    cos, sin = magnitude * jnp.cos(angles)[:, None], magnitude * jnp.sin(angles)[:, None]
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
    """scores, mask, softmax and context in one call: cuDNN's kernel on a GPU (bf16/fp16), XLA elsewhere."""
    # Left to choose, JAX takes XLA on a GPU too.
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # the kernel wants (B, T, N, H)
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=implementation).swapaxes(1, 2)


def merge_heads(config: ModelConfig, p: Leaves, x: Float[Array, "B N T H"]) -> Float[Array, "B T O"]:
    """(B, N, T, H) to (B, T, N·H)."""
    batch, _, time, _ = x.shape
    return x.swapaxes(1, 2).reshape(batch, time, -1)


# -- MLP and residual stream -----------------------------------------------------------


def gelu_new(x: Array) -> Array:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016, section 2), as x·sigmoid(2u).

    (1 + tanh u) / 2 is sigmoid(2u); written with tanh it loses every digit where
    tanh is near -1.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_new,
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


_OPS: Mapping[str, OpFunction] = {
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

# Inside a model's own `jit` these are inlined again, but each is traced once for every shape, not for every layer.
FUNCTIONS: Mapping[str, OpFunction] = {name: jax.jit(op, static_argnums=0) for name, op in _OPS.items()}
"""The ops by the name the table gives them."""
