"""Wrong ops outside attention: embedding, norms, projections, MLP, residual stream and head.

Each is written as the mistake would be written, not as the right op with a change. A
function here is planted by the name of the op for all layers or by tap for one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves

Array = Any

# -- Embedding -------------------------------------------------------------------------


def embedding_scaled(config: ModelConfig, p: Leaves, ids: Array) -> Array:
    """Multiplied by sqrt(D), as Gemma and the first transformer have it."""
    return p["weight"][ids] * jnp.asarray(config.hidden_size**0.5, p["weight"].dtype)


def position_after(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Positions counted from 1; the last row serves twice."""
    return p["weight"][jnp.minimum(positions + 1, config.max_position_embeddings - 1)]


# -- Norms -----------------------------------------------------------------------------


def _affine(p: Leaves, x: Array) -> Array:
    y = x * p["weight"].astype(jnp.float32)
    return y + p["bias"].astype(jnp.float32) if "bias" in p else y


def _centred(config: ModelConfig, x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x - x.mean(-1, keepdims=True) if config.norm == "layernorm" else x


def tenth_of_epsilon(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """1e-5 and 1e-6 confused."""
    y = _centred(config, x)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps / 10)
    return _affine(p, y).astype(x.dtype)


def epsilon_outside(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Epsilon added to the deviation instead of the variance."""
    y = _centred(config, x)
    y = y / (jnp.sqrt(jnp.square(y).mean(-1, keepdims=True)) + config.rms_norm_eps)
    return _affine(p, y).astype(x.dtype)


def no_epsilon(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Epsilon forgotten; a tiny floor keeps zero rows finite."""
    y = _centred(config, x)
    y = y / jnp.sqrt(jnp.maximum(jnp.square(y).mean(-1, keepdims=True), 1e-30))
    return _affine(p, y).astype(x.dtype)


def norm_in_bfloat16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Mean and variance in bfloat16."""
    y = x.astype(jnp.bfloat16)
    y = y - y.mean(-1, keepdims=True) if config.norm == "layernorm" else y
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + jnp.asarray(config.rms_norm_eps, jnp.bfloat16))
    y = y * p["weight"].astype(jnp.bfloat16)
    y = y + p["bias"].astype(jnp.bfloat16) if "bias" in p else y
    return y.astype(x.dtype)


def mean_subtracted(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """LayerNorm where the model has RMSNorm."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)
    return _affine(p, y).astype(x.dtype)


def mean_kept(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """RMSNorm where the model has LayerNorm."""
    y = x.astype(jnp.float32)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)
    return _affine(p, y).astype(x.dtype)


def unbiased_variance(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The sum of squares divided by D - 1: torch.var's default."""
    y = _centred(config, x)
    y = y / jnp.sqrt(jnp.square(y).sum(-1, keepdims=True) / (config.hidden_size - 1) + config.rms_norm_eps)
    return _affine(p, y).astype(x.dtype)


def norm_without_weight(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Normalised, and neither scaled nor shifted."""
    y = _centred(config, x)
    return (y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)).astype(x.dtype)


def norm_without_bias(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """LayerNorm's shift left out."""
    y = _centred(config, x)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)
    return (y * p["weight"].astype(jnp.float32)).astype(x.dtype)


def one_plus_weight(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Gemma's (1 + w) with weights that are stored whole."""
    y = _centred(config, x)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)
    y = y * (1 + p["weight"].astype(jnp.float32))
    y = y + p["bias"].astype(jnp.float32) if "bias" in p else y
    return y.astype(x.dtype)


def identity(config: ModelConfig, p: Leaves, x: Array, *rest: Array) -> Array:
    """The op left out."""
    return x


# -- Projections and head --------------------------------------------------------------


def projection_without_bias(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The bias never added."""
    return x @ p["kernel"]


def bias_twice(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Added by the matrix product and once more behind it."""
    return x @ p["kernel"] + p["bias"] + p["bias"]


def product_in_bfloat16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Operands rounded to bfloat16, as a matrix unit at default precision does."""
    y = jnp.matmul(x.astype(jnp.bfloat16), p["kernel"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return (y + p["bias"] if "bias" in p else y).astype(x.dtype)


def through_float16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The projection's output kept in float16."""
    y = x @ p["kernel"]
    y = y + p["bias"] if "bias" in p else y
    return y.astype(jnp.float16).astype(x.dtype)


def through_float8(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The projection's input kept in 8 bits (e4m3)."""
    y = x.astype(jnp.float8_e4m3fn).astype(x.dtype) @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def head_in_bfloat16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Logits rounded to bfloat16 before they are widened."""
    return (x.astype(jnp.bfloat16) @ p["weight"].astype(jnp.bfloat16).T).astype(jnp.float32)


def head_negated(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The sign is wrong."""
    return -jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32)


def head_scaled_by_width(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """T5 scales a tied head by 1 / sqrt(D)."""
    return jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32) / math.sqrt(config.hidden_size)


def logits_divided(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """A temperature of 1.1 left in the model (Granite's logits_scaling)."""
    return jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32) / 1.1


def logits_capped(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Gemma 2's soft cap at 30."""
    return 30.0 * jnp.tanh(jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32) / 30.0)


# -- MLP -------------------------------------------------------------------------------


def tanh_gelu(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """GELU's tanh approximation."""
    wide = x.astype(jnp.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + jnp.tanh(inner))).astype(x.dtype)


def erf_gelu(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The exact GELU."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * jax.scipy.special.erfc(-wide / math.sqrt(2))).astype(x.dtype)


def quick_gelu(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """CLIP's x sigmoid(1.702 x)."""
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-1.702 * wide))).astype(x.dtype)


def silu(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """SiLU where the model has GELU."""
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-wide))).astype(x.dtype)


def relu(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """ReLU, whatever the model has."""
    return jnp.maximum(x, 0)


def gate_and_up_swapped(config: ModelConfig, p: Leaves, gate: Array, up: Array) -> Array:
    """The activation on the wrong half."""
    return gate * jax.nn.silu(up.astype(jnp.float32)).astype(up.dtype)


def activated_product(config: ModelConfig, p: Leaves, gate: Array, up: Array) -> Array:
    """The activation behind the product."""
    return jax.nn.silu((gate * up).astype(jnp.float32)).astype(up.dtype)


def linear_gate(config: ModelConfig, p: Leaves, gate: Array, up: Array) -> Array:
    """No activation at all."""
    return gate * up


def gelu_gate(config: ModelConfig, p: Leaves, gate: Array, up: Array) -> Array:
    """GeGLU where the model has SwiGLU."""
    return tanh_gelu(config, p, gate) * up


def sigmoid_gate(config: ModelConfig, p: Leaves, gate: Array, up: Array) -> Array:
    """The plain GLU (Dauphin et al. 2017)."""
    return jax.nn.sigmoid(gate.astype(jnp.float32)).astype(up.dtype) * up


# -- Residual stream -------------------------------------------------------------------


def residual_twice(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """The branch already holds the stream: it is added again."""
    return stream + (branch + stream)


def branch_lost(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """The block contributes nothing."""
    return stream


def stream_lost(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """No skip connection."""
    return branch


def residual_scaled(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """The branch scaled by 1 / sqrt(2L) at run time, which GPT-2 does to its initial weights only."""
    return stream + branch * jnp.asarray((2 * config.num_hidden_layers) ** -0.5, branch.dtype)


def residual_in_float16(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """The stream kept in float16."""
    return (stream.astype(jnp.float16) + branch.astype(jnp.float16)).astype(stream.dtype)
