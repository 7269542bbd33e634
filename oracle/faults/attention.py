"""Wrong ops of attention: heads, rotation, mask, softmax, weighted sum.

Each is written as the mistake would be written. Grouped queries: query head n reads
key head n // (N / K), so that keys and values are repeated, not tiled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, rope_frequencies

Array = Any
NEGATIVE = -3.0e38
"""A score that softmax turns into zero."""

# -- Heads -----------------------------------------------------------------------------


def _heads(config: ModelConfig, x: Array) -> int:
    return x.shape[-1] // config.head_dim


def split_without_transposing(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """(B, T, N·H) reshaped to (B, N, T, H) at once."""
    return x.reshape(x.shape[0], _heads(config, x), x.shape[1], config.head_dim)


def split_width_first(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The last axis taken as (H, N) instead of (N, H)."""
    batch, time, _ = x.shape
    return x.reshape(batch, time, config.head_dim, _heads(config, x)).transpose(0, 3, 1, 2)


def split_and_normalised(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Each query head divided by its root mean square (Qwen3's QK norm)."""
    heads = x.reshape(*x.shape[:2], _heads(config, x), config.head_dim).swapaxes(1, 2).astype(jnp.float32)
    return (heads / jnp.sqrt(jnp.square(heads).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def split_in_reverse(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Key and value heads counted from the end."""
    return x.reshape(*x.shape[:2], _heads(config, x), config.head_dim).swapaxes(1, 2)[:, ::-1]


def merged_without_transposing(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """(B, N, T, H) reshaped to (B, T, N·H) at once."""
    return x.reshape(x.shape[0], x.shape[2], -1)


def heads_normalised_together(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """QK-norm over all heads of a token at once (OLMo 2), with the weight of one head."""
    wide = x.astype(jnp.float32)
    spread = jnp.square(wide).mean((1, 3), keepdims=True)
    return (wide / jnp.sqrt(spread + config.rms_norm_eps) * p["weight"].astype(jnp.float32)).astype(x.dtype)


# -- Rotation --------------------------------------------------------------------------


def _frequencies(config: ModelConfig, theta: float) -> Array:
    return theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)


def angles_of_another_theta(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """The theta of another family; nothing is scaled."""
    theta = 10000.0 if config.rope_theta > 10000.0 else 500000.0
    return positions[..., None].astype(jnp.float32) * _frequencies(config, theta)


def angles_unscaled(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """rope_scaling ignored."""
    return positions[..., None].astype(jnp.float32) * _frequencies(config, config.rope_theta)


def angles_all_divided(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """llama3 scaling taken for linear: every frequency divided by the factor."""
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    return positions[..., None].astype(jnp.float32) / factor * _frequencies(config, config.rope_theta)


def angles_of_model_width(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Exponents divided by D instead of H."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.hidden_size
    return positions[..., None].astype(jnp.float32) * config.rope_theta**-exponents


def angles_in_bfloat16(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Frequencies and positions rounded to bfloat16, as a model cast as a whole has them."""

    frequencies = jnp.asarray(rope_frequencies(config), jnp.bfloat16)
    return (positions[..., None].astype(jnp.bfloat16) * frequencies).astype(jnp.float32)


def angles_doubled(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """A whole turn taken for half a one."""

    return 2 * positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))


def angles_after(config: ModelConfig, p: Leaves, positions: Array) -> Array:
    """Positions counted from 1."""

    return (positions[..., None] + 1).astype(jnp.float32) * jnp.asarray(rope_frequencies(config))


def interleaved(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """Pairs (2i, 2i + 1), as in Meta's code and GPT-J, instead of (i, i + H/2)."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def backwards(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """The sign of the sine is wrong."""
    half = x.shape[-1] // 2
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(x.dtype)


def rotated_without_magnitude(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """yarn's attention factor forgotten: lengths stay."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def half_rotated(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """Only the first half of each head is rotated (GPT-NeoX's rotary_pct), with the first frequencies."""
    part = x.shape[-1] // 4
    cos, sin = jnp.cos(angles)[:, None, :, :part], jnp.sin(angles)[:, None, :, :part]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :part], wide[..., part : 2 * part], wide[..., 2 * part :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def rotated_in_bfloat16(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """Sine and cosine rounded to bfloat16, and the rotation computed there."""
    half = x.shape[-1] // 2
    cos, sin = (f(angles)[:, None].astype(jnp.bfloat16) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half].astype(jnp.bfloat16), x[..., half:].astype(jnp.bfloat16)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def cosine_for_sine(config: ModelConfig, p: Leaves, x: Array, angles: Array) -> Array:
    """The sine and cosine tables exchanged."""
    half = x.shape[-1] // 2
    cos, sin = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# -- Scores ----------------------------------------------------------------------------


def product(q: Array, k: Array) -> Array:
    """q·k of every query head with the key head it reads, not scaled."""
    keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return jnp.einsum("bnth,bnsh->bnts", q, keys, preferred_element_type=jnp.float32)


def tiled_scores(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Query head n reads key head n % K."""
    keys = jnp.tile(k, (1, q.shape[1] // k.shape[1], 1, 1))
    return jnp.einsum("bnth,bnsh->bnts", q, keys, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5


def unscaled_scores(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """No division by sqrt(H)."""
    return product(q, k)


def twice_scaled_scores(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Divided by H: the queries were scaled before."""
    return product(q, k) / q.shape[-1]


def scores_of_model_width(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Divided by sqrt(D) instead of sqrt(H)."""
    return product(q, k) / config.hidden_size**0.5


def scores_by_quotient(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """H taken to be D / N."""
    return product(q, k) / (config.hidden_size / config.num_attention_heads) ** 0.5


def capped_scores(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Gemma 2's soft cap at 50."""
    return 50.0 * jnp.tanh(product(q, k) / q.shape[-1] ** 0.5 / 50.0)


def scores_with_slopes(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """ALiBi's slopes on top of what the model has."""
    heads = q.shape[1]
    slopes = 2.0 ** (-8.0 * (jnp.arange(heads) + 1) / heads)
    distance = jnp.arange(k.shape[2])[None, :] - jnp.arange(q.shape[2])[:, None]
    return product(q, k) / q.shape[-1] ** 0.5 + slopes[:, None, None] * distance


def scores_in_bfloat16(config: ModelConfig, p: Leaves, q: Array, k: Array) -> Array:
    """Accumulated and kept in bfloat16."""
    keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1).astype(jnp.bfloat16)
    product = jnp.einsum("bnth,bnsh->bnts", q.astype(jnp.bfloat16), keys)
    return (product * jnp.asarray(q.shape[-1] ** -0.5, jnp.bfloat16)).astype(jnp.float32)


# -- Mask ------------------------------------------------------------------------------


def _same_document(segments: Array, key_segments: Array) -> Array:
    return True if segments is None else segments[:, :, None] == key_segments[:, None, :]


def sees_next(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """One token of the future is visible."""
    allowed = key_slots[None, None, :] <= slots[:, :, None] + 1
    return (allowed & _same_document(segments, key_segments))[:, None]


def blind_to_itself(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A token does not see itself; the first of a document sees nothing."""
    allowed = key_slots[None, None, :] < slots[:, :, None]
    return (allowed & _same_document(segments, key_segments))[:, None]


def not_causal(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Everything of the document is visible."""
    allowed = jnp.ones((*slots.shape, key_slots.shape[0]), bool)
    return (allowed & _same_document(segments, key_segments))[:, None]


def sliding_window(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Only the last 16 tokens are visible (Mistral)."""
    allowed = (key_slots[None, None, :] <= slots[:, :, None]) & (key_slots[None, None, :] > slots[:, :, None] - 16)
    return (allowed & _same_document(segments, key_segments))[:, None]


def window_one_wider(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """A window of sliding_window tokens beside the token itself."""
    ago = slots[:, :, None] - key_slots[None, None, :]
    allowed = (ago >= 0) & (ago <= (config.sliding_window or 0))
    return (allowed & _same_document(segments, key_segments))[:, None]


def window_forgotten(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """All earlier tokens of the document are visible (a Mistral run as a Llama)."""
    allowed = key_slots[None, None, :] <= slots[:, :, None]
    return (allowed & _same_document(segments, key_segments))[:, None]


def across_documents(
    config: ModelConfig, p: Leaves, slots: Array, key_slots: Array, segments: Array, key_segments: Array
) -> Array:
    """Packed documents see each other."""
    return (key_slots[None, None, :] <= slots[:, :, None])[:, None]


def mask_too_small(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """Hidden scores are lowered by 10 only."""
    return jnp.where(allowed, scores, scores - 10.0)


def mask_of_gpt2(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """Hidden scores are -10,000, as in the first GPT-2 code."""
    return jnp.where(allowed, scores, -1e4)


def mask_of_zero(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """The boolean mask is multiplied with the scores."""
    return scores * allowed


def mask_added(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """The boolean mask is added as ones and zeros."""
    return scores + allowed


def not_masked(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """The mask is not used."""
    return scores


def mask_inverted(config: ModelConfig, p: Leaves, scores: Array, allowed: Array) -> Array:
    """True taken for hidden (torch's key_padding_mask)."""
    return jnp.where(allowed, NEGATIVE, scores)


# -- Softmax and weighted sum ----------------------------------------------------------


def softmax_in_bfloat16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Exponentials and their sum in bfloat16."""
    return jax.nn.softmax(x.astype(jnp.bfloat16), axis=-1).astype(jnp.float32)


def softmax_in_float16(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Exponentials and their sum in float16."""
    return jax.nn.softmax(x.astype(jnp.float16), axis=-1).astype(jnp.float32)


def softmax_over_queries(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The wrong axis."""
    return jax.nn.softmax(x, axis=-2)


def softmax_over_heads(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The wrong axis."""
    return jax.nn.softmax(x, axis=1)


def softmax_unshifted(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """Exponentials without subtracting the row's maximum first."""
    powers = jnp.exp(x)
    return powers / powers.sum(-1, keepdims=True)


def softmax_base_2(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """exp2 without the factor log2(e), as a fused kernel needs it."""
    powers = jnp.exp2(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def softmax_with_sink(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """One is added to the denominator (softmax-off-by-one, attention sinks)."""
    powers = jnp.exp(x)
    return powers / (1 + powers.sum(-1, keepdims=True))


def tiled_context(config: ModelConfig, p: Leaves, weights: Array, v: Array) -> Array:
    """Query head n reads value head n % K."""
    values = jnp.tile(v, (1, weights.shape[1] // v.shape[1], 1, 1))
    return jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), values)


def context_of_bfloat16(config: ModelConfig, p: Leaves, weights: Array, v: Array) -> Array:
    """Weights rounded to bfloat16 before the sum."""
    values = jnp.repeat(v, weights.shape[1] // v.shape[1], axis=1)
    return jnp.einsum("bnts,bnsh->bnth", weights.astype(jnp.bfloat16).astype(v.dtype), values)


def context_transposed(config: ModelConfig, p: Leaves, weights: Array, v: Array) -> Array:
    """Weights summed over queries instead of keys."""
    values = jnp.repeat(v, weights.shape[1] // v.shape[1], axis=1)
    return jnp.einsum("bnts,bnth->bnsh", weights.astype(v.dtype), values)
