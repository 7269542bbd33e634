"""Models on which a mistake cannot hide, written as Hugging Face folders without the product.

All dimensions are distinct (but for one forced square), biases are not zero, norm
weights are not one, 1 < K < N where the family allows it, and head_dim is not
D / N in some; further ones have K = 1, K = N, odd sizes, contexts beyond 512 and
many layers. torchref defines the tensors and safetensors writes them.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from jaxgpt.config import from_hf
from oracle import weight_kinds
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
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
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
    "qwen3": {**_LLAMA, "model_type": "qwen3", "hidden_size": 44, "head_dim": 10, "tie_word_embeddings": True},
    "mistral-window": {**_LLAMA, "model_type": "mistral", "sliding_window": 13},
    "qwen3-yarn-biased": {**_LLAMA, "model_type": "qwen3", "attention_bias": True, "rope_parameters": _YARN},
    "gpt2-long": {
        **_GPT2,
        "vocab_size": 127,
        "n_embd": 35,
        "n_inner": 44,
        "n_layer": 2,
        "n_head": 5,
        "n_positions": 1024,
    },
    "gpt2-deep": {**_GPT2, "n_embd": 26, "n_inner": 38, "n_layer": 12, "n_head": 2, "n_positions": 48},
    "llama-mqa-odd": {
        **_LLAMA,
        "vocab_size": 97,
        "hidden_size": 35,
        "intermediate_size": 51,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 75,
    },
    "llama-mha": {
        **_LLAMA,
        "vocab_size": 109,
        "hidden_size": 33,
        "intermediate_size": 47,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 53,
        "tie_word_embeddings": True,
    },
    "llama3-long": {
        **_LLAMA,
        "vocab_size": 113,
        "hidden_size": 28,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 640,
        "rope_parameters": {**_LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 128},
    },
    "llama-deep": {
        **_LLAMA,
        "hidden_size": 28,
        "intermediate_size": 45,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 48,
    },
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


def write(config: Config, folder: Path, dtype: str, seed: int = 0, kind: str = "random") -> Path:
    """A folder with config.json and model.safetensors of weights drawn by `kind`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text)
    tensors = weight_kinds.draw(config, seed, kind)
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def candidate(folder: Path, dtype: str) -> Candidate:
    """The folder as a candidate, its tensors named by `oracle.folder` (no importer is involved)."""
    config = from_hf(json.loads((folder / "config.json").read_text()))
    return Candidate(config, parameters(read(folder)), dtype)
