"""Random models on which a mistake cannot hide, written as Hugging Face folders without the product.

All dimensions are distinct (but for one forced square), biases are not zero, norm
weights are not one, 1 < K < N where the family allows it, and head_dim is not
D / N in some. torchref defines the tensors and safetensors writes them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import torchref
from jaxgpt.config import from_hf
from oracle.candidate import Candidate
from oracle.folder import parameters, read
from oracle.reference import DTYPES

Config = dict[str, Any]
"""The content of a config.json."""

_GPT2: Config = {
    "model_type": "gpt2",
    "vocab_size": 131,
    "n_embd": 36,
    "n_inner": 52,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_LLAMA: Config = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN2: Config = {
    **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "model_type": "qwen2",
    "hidden_size": 48,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}

MODELS: dict[str, Config] = {
    "gpt2": _GPT2,
    "gpt2-erf-untied": {**_GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
    "llama": _LLAMA,
    "llama-square-biased-tied-linear": {
        **_LLAMA,
        "hidden_size": 84,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama3-scaling": {**_LLAMA, "rope_parameters": _LLAMA3},
    "qwen2-tied": _QWEN2,
}
"""Tiny models of both families."""

WIDE: dict[str, Config] = {
    "gpt2-wide": {
        **_GPT2,
        "vocab_size": 1031,
        "n_embd": 768,
        "n_inner": 3072,
        "n_layer": 2,
        "n_head": 12,
        "n_positions": 1024,
    },
    "llama-wide": {
        **_LLAMA,
        "vocab_size": 1031,
        "hidden_size": 896,
        "intermediate_size": 2432,
        "num_hidden_layers": 2,
        "num_attention_heads": 14,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
}
"""Widths and lengths of real models, for the calibration."""


def write(config: Config, folder: Path, dtype: str, seed: int = 0) -> Path:
    """A folder with config.json and model.safetensors of random weights; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text)
    generator = torch.Generator().manual_seed(seed)
    tensors = torchref.build(config).state_dict()
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    drawn = {name: _draw(name, tensor, generator).to(DTYPES[dtype]) for name, tensor in tensors.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values of realistic scale in which nothing is zero, one or symmetric."""
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("bias"):
        return 0.2 * noise
    if like.ndim == 1:
        return 1.0 + 0.3 * noise
    if any(part in name for part in ("wte", "wpe", "embed_tokens")):
        return 0.3 * noise
    return noise * max(like.shape) ** -0.5


def candidate(folder: Path, dtype: str) -> Candidate:
    """The folder as a candidate, its tensors named by `oracle.folder` (no importer is involved)."""
    config = from_hf(json.loads((folder / "config.json").read_text()))
    return Candidate(config, parameters(read(folder)), dtype)
