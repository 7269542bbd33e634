"""Sizes with a name: what `--preset` starts from."""

import dataclasses

from jaxgpt.config import LLAMA_STYLE, QWEN2_STYLE, ModelConfig

GPT2 = ModelConfig(
    vocab_size=50304,  # 50,257 rounded up to a multiple of 64
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    max_position_embeddings=1024,
)
PRESETS: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "tiny": dataclasses.replace(
        GPT2,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
    ),
    "llama-tiny": dataclasses.replace(
        GPT2,
        **LLAMA_STYLE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    ),
    "qwen2-0.5b": ModelConfig(
        **QWEN2_STYLE,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "llama3-8b": ModelConfig(
        **LLAMA_STYLE,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    ),
}
