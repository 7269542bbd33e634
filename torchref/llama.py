"""Llama (Touvron et al. 2023), Mistral, Qwen2 and Qwen3, with the names of Hugging Face's LlamaForCausalLM."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchref import ops
from torchref.config import LlamaConfig, Rope
from torchref.decoder import Block, Decoder, Ops, Step, Tape, embedding


def frequencies(rope: Rope, head_dim: int) -> Float[Tensor, "R"]:
    """Radians per position of each pair, float64; R = H / 2."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain if rope.kind == "default" else _llama3(plain, rope)


def _llama3(plain: Float[Tensor, "R"], rope: Rope) -> Float[Tensor, "R"]:
    """Llama 3.1: waves longer than the old context allows are stretched, short ones stay, the rest is between."""
    wavelength = 2 * math.pi / plain
    context = rope.original_max_position_embeddings
    longest, shortest = context / rope.low_freq_factor, context / rope.high_freq_factor
    share = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    stretched = plain / rope.factor
    between = (1 - share) * stretched + share * plain
    return torch.where(wavelength > longest, stretched, torch.where(wavelength < shortest, plain, between))


def _yarn(plain: Float[Tensor, "R"], rope: Rope) -> Float[Tensor, "R"]:
    """yarn (Peng et al. 2023): a ramp over the pairs, from those that stay to those that are stretched."""
    width = 2 * len(plain)
    low, high = (
        width * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        for rotations in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched


def stretch(rope: Rope) -> float:
    """By how much rotated queries and keys grow."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def angles(rope: Rope, head_dim: int, positions: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T R"]:
    """Position times frequency in `dtype`."""
    return positions[..., None].to(dtype) * frequencies(rope, head_dim).to(dtype)


class RMSNorm(nn.Module):
    """RMSNorm, float32 at least inside."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return ops.rms_norm(x, self.weight, self.eps)


class LlamaAttention(nn.Module):
    """Parameters of attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = config
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=c.output_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)


class LlamaMLP(nn.Module):
    """Parameters of the gated feed-forward."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = config
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)


class LlamaBlock(Block):
    """Pre-norm attention with rotated queries and keys, then a pre-norm gated MLP."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.norms_heads = config, layer, config.qk_norm
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def ops(self) -> Ops:
        """See `Block.ops`."""
        c, grows = self.config, stretch(self.config.rope)
        norms = {"attn.q_norm": self.self_attn.q_norm, "attn.k_norm": self.self_attn.k_norm} if c.qk_norm else {}
        return {
            **self.attention_ops(c.num_attention_heads, c.num_key_value_heads, self.input_layernorm.weight.dtype),
            **dict.fromkeys(("attn.q_rope", "attn.k_rope"), lambda x, angles: ops.rope(x, angles, grows)),
            **norms,
            "attn_norm": self.input_layernorm,
            "attn.q": self.self_attn.q_proj,
            "attn.k": self.self_attn.k_proj,
            "attn.v": self.self_attn.v_proj,
            "attn.out": self.self_attn.o_proj,
            "mlp_norm": self.post_attention_layernorm,
            "mlp.gate": self.mlp.gate_proj,
            "mlp.up": self.mlp.up_proj,
            "mlp.act": lambda gate, up: ops.activation(gate, c.activation) * up,
            "mlp.down": self.mlp.down_proj,
        }

    def forward(self, tape: Tape, stream: Tensor, step: Step) -> Tensor:
        """See `Block.forward`."""
        stream = tape("attn_residual", stream, self.attend(tape, tape("attn_norm", stream), step))
        normed = tape("mlp_norm", stream)
        gated = tape("mlp.act", tape("mlp.gate", normed), tape("mlp.up", normed))
        return tape("mlp_residual", stream, tape("mlp.down", gated))


class LlamaModel(nn.Module):
    """Parameters under `model.`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(Decoder):
    """Llama, Mistral or Qwen with its language-model head, tied to the embedding or not."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.rope, self.window = config, config.rope, config.sliding_window
        self.vocab_size, self.positions_limit = config.vocab_size, None
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """See `Decoder.tie`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> Sequence[Block]:
        """See `Decoder.blocks`."""
        return cast("list[Block]", list(self.model.layers))

    def ops(self) -> Ops:
        """See `Decoder.ops`."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return {
            "embed.tokens": self.model.embed_tokens,
            "rope.angles": lambda positions: angles(self.rope, self.head_dim, positions, wide),
            "mask": lambda *slots: ops.attention_mask(*slots, window=self.window),
            "final_norm": self.model.norm,
            "logits": lambda x: ops.logits(x, self.lm_head.weight),
        }

    def embed(self, tape: Tape, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder.embed`."""
        return tape("embed.tokens", ids), tape("rope.angles", positions)
