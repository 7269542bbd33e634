"""Faults that stand in no list and for which nobody writes a repair.

They measure what the oracle does with what it has never seen: it must say where it
begins and call it unknown. A name for any of them is confidently wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, rope_frequencies
from jaxgpt.taps import Op
from oracle.faults.attention import product
from oracle.faults.decoding import kept, stepping
from oracle.faults.fault import Condition, Fault, Plant, at, everywhere, has_rope, instead, position_tap
from oracle.faults.weights import edited
from oracle.faults.wiring import rewired

Array = Any
OPS, BITS, FORWARD, DECODE = "operators", "bits", "forward", "decode"

# -- Parameters ------------------------------------------------------------------------


def column_zeroed(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """One output is dead."""
    spoilt = kernel.copy()
    spoilt[:, 7] = 0
    return spoilt


def rows_sorted(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Every row in ascending order."""
    return np.sort(kernel, axis=1)


def checkerboard(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Every other number has the wrong sign."""
    rows, columns = np.indices(kernel.shape)
    return np.where((rows + columns) % 2, -kernel, kernel)


# -- Ops -------------------------------------------------------------------------------


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


def rectified_norm(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """A ReLU slipped in behind the norm."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True) if config.norm == "layernorm" else y
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps) * p["weight"].astype(jnp.float32)
    y = y + p["bias"].astype(jnp.float32) if "bias" in p else y
    return jax.nn.relu(y).astype(x.dtype)


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


def clipped_activation(config: ModelConfig, p: Leaves, x: Array, *up: Array) -> Array:
    """The MLP's activations clipped to [-0.1, 0.3]."""
    wide = x.astype(jnp.float32)
    act = {"silu": jax.nn.silu, "gelu": lambda y: jax.nn.gelu(y, approximate=False)}.get(config.hidden_act, jax.nn.gelu)
    y = jnp.clip(act(wide), -0.1, 0.3).astype(x.dtype)
    return y * up[0] if up else y


def smeared_residual(config: ModelConfig, p: Leaves, stream: Array, branch: Array) -> Array:
    """A tenth of the neighbouring token's branch leaks in."""
    return stream + branch + jnp.asarray(0.1, branch.dtype) * jnp.roll(branch, 1, axis=1)


def every_ninth_logit(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Every ninth token is one nat too likely."""
    logits = jnp.matmul(x, p["weight"].T, preferred_element_type=jnp.float32)
    return logits + (jnp.arange(logits.shape[-1]) % 9 == 0)


def third_token_hidden(config: ModelConfig, p: Leaves, *given: Array) -> Array:
    """Slot 3 is never visible but to itself."""
    slots, key_slots, segments, key_segments = given
    allowed = (key_slots[None, None, :] <= slots[:, :, None]) & ((key_slots != 3) | (slots[:, :, None] == 3))
    if segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return allowed[:, None]


# -- Wiring and decoding ---------------------------------------------------------------


def gate_from_attention(config: ModelConfig, op: Op) -> Op:
    """The last layer's MLP reads the norm of the first's."""
    last = f"layers.{config.num_hidden_layers - 1}"
    if not op.tap.startswith(f"{last}.mlp.") or f"{last}.mlp_norm" not in op.inputs:
        return op
    return replace(op, inputs=("layers.0.mlp_norm",))


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


def _unlisted(
    name: str, plant: Plant, rung: str, tap: str | Callable[[ModelConfig], str], applies: Condition = everywhere
) -> Fault:
    return Fault(name, name, plant, rung, at(tap) if isinstance(tap, str) else tap, applies)


HELD_OUT: tuple[Fault, ...] = (
    _unlisted("column of zeros", edited("layers.1.mlp.up.kernel", column_zeroed), BITS, "layers.1.mlp.up"),
    _unlisted("rows sorted", edited("layers.0.attn.out.kernel", rows_sorted), BITS, "layers.0.attn.out"),
    _unlisted("signs in a checkerboard", edited("layers.1.attn.k.kernel", checkerboard), BITS, "layers.1.attn.k"),
    _unlisted(
        "values through tanh", instead({"layers.1.attn.v_heads": values_through_tanh}), OPS, "layers.1.attn.v_heads"
    ),
    _unlisted("one head sharper", instead({"scores": second_head_doubled}), OPS, "layers.0.attn.scores"),
    _unlisted("theta bends at 20", instead({"angles": bent_theta}), OPS, "rope.angles", has_rope),
    _unlisted("ReLU behind the norm", instead({"layers.1.mlp_norm": rectified_norm}), OPS, "layers.1.mlp_norm"),
    _unlisted("keys rolled", instead({"layers.1.attn.scores": keys_rolled}), OPS, "layers.1.attn.scores"),
    _unlisted("weights squared", instead({"softmax": squared_weights}), OPS, "layers.0.attn.weights"),
    _unlisted("small weights dropped", instead({"softmax": thresholded_weights}), OPS, "layers.0.attn.weights"),
    _unlisted("weights in steps", instead({"layers.1.attn.weights": quantised_weights}), OPS, "layers.1.attn.weights"),
    _unlisted("slot 0 weighs more", instead({"context": first_token_weighs_more}), OPS, "layers.0.attn.context"),
    _unlisted("alternating signs", instead({"merge_heads": alternating_signs}), OPS, "layers.0.attn.merged"),
    _unlisted("clipped activation", instead({"layers.1.mlp.act": clipped_activation}), OPS, "layers.1.mlp.act"),
    _unlisted("leaking residual", instead({"layers.0.mlp_residual": smeared_residual}), OPS, "layers.0.mlp_residual"),
    _unlisted("every ninth logit", instead({"head": every_ninth_logit}), OPS, "logits"),
    _unlisted("slot 3 hidden", instead({"attention_mask": third_token_hidden}), OPS, "mask"),
    _unlisted(
        "MLP of another layer's norm",
        rewired(gate_from_attention),
        FORWARD,
        lambda config: f"layers.{config.num_hidden_layers - 1}.mlp.{'gate' if config.gated_mlp else 'up'}",
    ),
    _unlisted("every fourth slot empty", kept(forgets_every_fourth), DECODE, "layers.0.attn.keys"),
    _unlisted("odd rows two behind", stepping(odd_rows_wait), DECODE, position_tap),
)
"""At least fifteen; see the module."""
