"""Wrong ops outside attention that nobody repairs."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, Leaves

Array = Any
TILE = 32
"""Input channels of a tile of a matrix product."""
LANES = 8
"""Numbers that a vector instruction takes."""


def rectified_norm(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """A ReLU slipped in behind the norm."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True) if config.norm == "layernorm" else y
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps) * p["weight"].astype(jnp.float32)
    y = y + p["bias"].astype(jnp.float32) if "bias" in p else y
    return jax.nn.relu(y).astype(x.dtype)


def clipped_activation(config: ModelConfig, p: Leaves, x: Array, *up: Array) -> Array:
    """The MLP's activations clipped to [-0.1, 0.3]."""
    y = jnp.clip(_activated(config, x), -0.1, 0.3).astype(x.dtype)
    return y * up[0] if up else y


def _activated(config: ModelConfig, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    act = {"silu": jax.nn.silu, "gelu": lambda y: jax.nn.gelu(y, approximate=False)}.get(config.hidden_act, jax.nn.gelu)
    return act(wide)


def smeared_residual(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """A tenth of the neighbouring token's branch leaks in."""
    return stream + branch + jnp.asarray(0.1, branch.dtype) * jnp.roll(branch, 1, axis=1)


def every_ninth_logit(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Every ninth token is one nat too likely."""
    logits = jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32)
    return logits + (jnp.arange(logits.shape[-1]) % 9 == 0)


def ids_clipped(config: ModelConfig, p: Leaves, ids: Array) -> Array:
    """The last tenth of the ids all read one row: the table was taken to be as small as another tokenizer's."""
    return p["weight"][jnp.minimum(ids, config.vocab_size * 9 // 10)]


def positions_wrap(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Positions counted in five bits."""
    return p["weight"][positions & 31]


def normed_over_sequence(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Mean and variance over time and width together."""
    y = x.astype(jnp.float32)
    y = y - y.mean((-2, -1), keepdims=True) if config.norm == "layernorm" else y
    y = y / jnp.sqrt(jnp.square(y).mean((-2, -1), keepdims=True) + config.rms_norm_eps)
    y = y * p["weight"].astype(jnp.float32)
    return (y + p["bias"].astype(jnp.float32) if "bias" in p else y).astype(x.dtype)


def remainder_of_tiles_dropped(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The product sums whole tiles only; input channels behind the last are left out."""
    whole = x.shape[-1] // TILE * TILE
    y = x[..., :whole] @ p["kernel"][:whole]
    return y + p["bias"] if "bias" in p else y


def remainder_not_activated(config: ModelConfig, p: Leaves, x: Array, *up: Array) -> Array:
    """A vectorised loop leaves the channels behind the last whole vector as they are."""
    whole = (x.shape[-1] - 1) // LANES * LANES
    y = jnp.where(jnp.arange(x.shape[-1]) < whole, _activated(config, x).astype(x.dtype), x)
    return y * up[0] if up else y


def first_token_without_branch(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """The loop over tokens begins at 1."""
    return stream.at[:, 1:].add(branch[:, 1:])


def head_of_unit_rows(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Every row of the head divided by its norm: similarity instead of a product."""
    rows = p["weight"].astype(jnp.float32)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return FUNCTIONS["head"](config, {"weight": rows.astype(x.dtype)}, x)
