"""Arithmetic of training, for tokens per second to become a share of the hardware's peak."""

import math

from jaxgpt import weights
from jaxgpt.config import ModelConfig

PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by the beginning of the device's name, from the vendors' data sheets."""


def parameter_count(config: ModelConfig) -> int:
    """All parameters; a tied head counts once."""
    return sum(math.prod(p.shape) for p in weights.parameters(config))


def flops_per_token(config: ModelConfig, time: int) -> float:
    """FLOPs of forward and backward a token: 6·(parameters in matrix products) + 12·L·N·H·T.

    The PaLM paper's formula (Chowdhery et al. 2022, appendix B): the head counts,
    looked-up rows do not, and attention is not halved for causality.
    """
    matrices = (p for p in weights.parameters(config) if len(p.shape) == 2 and p.name not in _looked_up(config))
    in_products = sum(math.prod(p.shape) for p in matrices)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * time
    return 6.0 * in_products + attention


def forward_flops_per_token(config: ModelConfig, time: float) -> float:
    """The forward's share: 2·(parameters in matrix products) + 4·L·N·H·T, for a token that attends to T."""
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * time
    return (flops_per_token(config, 0) + attention) / 3


def bytes_per_decoded_token(config: ModelConfig, time: float, item: int) -> float:
    """Least that decoding one token reads: the weights, without rows not looked up, and T keys and values.

    `item` is the size of an element in bytes; nothing is read twice, and no slot that holds nothing.
    """
    looked_up = _looked_up(config)
    read = sum(math.prod(p.shape) for p in weights.parameters(config) if p.name not in looked_up)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * time
    return item * (read + cached)


def _looked_up(config: ModelConfig) -> set[str]:
    """Tables of which a token takes one row; a tied head multiplies by all of its table."""
    return {"embed.positions.weight"} | (set() if config.tie_word_embeddings else {"embed.tokens.weight"})


def peak(device_kind: str) -> float | None:
    """The device's bf16 peak in FLOP/s, or None where it is not known (every CPU)."""
    return next((flops for name, flops in PEAK_BF16.items() if device_kind.startswith(name)), None)
