"""Faults that the oracle is known to find, each planted in memory in a true candidate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from jaxgpt.ops import norm as true_norm
from oracle.candidate import Candidate


@dataclass(frozen=True)
class Fault:
    """A class of mistake and where it must show first."""

    name: str
    plant: Callable[[Candidate], Candidate]
    rung: str
    tap: Callable[[ModelConfig], str]
    """The first tap (for the rung bits: the parameter's module) that must differ."""
    applies: Callable[[ModelConfig], bool] = lambda _: True


def _with(candidate: Candidate, parameters: Mapping[str, Any]) -> Candidate:
    return replace(candidate, stored={**candidate.stored, **parameters})


def transposed_projection(candidate: Candidate) -> Candidate:
    """Layer 1's query kernel transposed: where it is square no shape check sees it."""
    name = "layers.1.attn.q.kernel"
    return _with(candidate, {name: jnp.asarray(candidate.stored[name]).T})


def bf16_read_as_fp16(candidate: Candidate) -> Candidate:
    """Layer 1's value kernel with the bits of bfloat16 taken for those of float16."""
    name = "layers.1.attn.v.kernel"
    bits = np.asarray(jnp.asarray(candidate.stored[name], jnp.bfloat16)).view(np.float16)
    return _with(candidate, {name: jnp.asarray(bits.astype(np.float32))})


def interleaved_rope(candidate: Candidate) -> Candidate:
    """RoPE rotates the pairs (2i, 2i + 1) instead of (i, i + H/2)."""
    return replace(candidate, replace={**candidate.replace, "rope": _interleaved})


def _interleaved(config: ModelConfig, p: Leaves, x: Any, angles: Any) -> Any:
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def wrong_norm_epsilon(candidate: Candidate) -> Candidate:
    """The norm's epsilon ten times too small."""
    config = replace(candidate.config, rms_norm_eps=candidate.config.rms_norm_eps / 10)

    def norm(_: ModelConfig, p: Leaves, x: Any) -> Any:
        return true_norm(config, p, x)

    return replace(candidate, replace={**candidate.replace, "norm": norm})


def cache_position_off_by_one(candidate: Candidate) -> Candidate:
    """After the prefill every step believes that one token more is stored."""
    return replace(candidate, step=_one_too_far)


def _one_too_far(
    config: ModelConfig, params: model.Params, ids: Any, counts: Any, cache: KVCache, **given: Any
) -> tuple[model.Output, KVCache]:
    shifted = cache._replace(lengths=cache.lengths + (cache.lengths > 0))
    output, after = model.forward_cached(config, params, ids, counts, shifted, **given)
    return output, after._replace(lengths=cache.lengths + counts)


def _is_square(config: ModelConfig) -> bool:
    return config.num_attention_heads * config.head_dim == config.hidden_size and config.num_hidden_layers > 1


def _has_rope(config: ModelConfig) -> bool:
    return config.position_embedding == "rope"


FAULTS: tuple[Fault, ...] = (
    Fault("transposed square projection", transposed_projection, "bits", lambda _: "layers.1.attn.q", _is_square),
    Fault("bf16 bits read as fp16", bf16_read_as_fp16, "bits", lambda _: "layers.1.attn.v"),
    Fault("RoPE interleaved", interleaved_rope, "operators", lambda _: "layers.0.attn.q_rope", _has_rope),
    Fault("norm epsilon wrong", wrong_norm_epsilon, "operators", lambda _: "layers.0.attn_norm"),
    Fault(
        "cache position off by one",
        cache_position_off_by_one,
        "decode",
        lambda config: "rope.angles" if _has_rope(config) else "embed.positions",
    ),
)
