"""A model's config as GGUF metadata, under the keys of llama.cpp (`llama-arch.cpp`).

Values are Python's: an int is written as uint32, a float as float32, a list as an array.
"""

import dataclasses

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.weights import gguf_architecture

Metadata = dict[str, int | float | bool | str | list[str] | list[int] | list[float]]


def metadata(config: ModelConfig, name: str) -> tuple[Metadata, list[str]]:
    """The model's keys and values, without tokenizer; and lines the caller should print.

    Raises:
        InputError: llama.cpp cannot compute this model.
    """
    architecture = gguf_architecture(config)
    context, notices = _context(config)
    sizes = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    if architecture == "gpt2":
        own: Metadata = {"attention.layer_norm_epsilon": float(config.rms_norm_eps)}
        if config.hidden_act == "gelu":
            notices.append(
                "llama.cpp computes GELU by its tanh approximation, this model exactly: logits move by some thousandths"
            )
    else:
        own = {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), **_rope(config)}
    found: Metadata = {"general.architecture": architecture, "general.type": "model", "general.name": name}
    return {**found, **{f"{architecture}.{key}": value for key, value in {**sizes, **own}.items()}}, notices


def _context(config: ModelConfig) -> tuple[int, list[str]]:
    window, context = config.sliding_window, config.max_position_embeddings
    if window is None or window >= context:
        return context, []
    # llama.cpp's llama attends to all tokens: up to the window's length that is the same model.
    return window, [f"llama.cpp has no sliding window here: context_length is the window, {window:,}, not {context:,}"]


def _rope(config: ModelConfig) -> Metadata:
    found: Metadata = {
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return found
    found |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    if scaling.rope_type == "linear":
        return found
    if not scaling.truncate:
        raise InputError("llama.cpp has no yarn scaling with truncate=false; export with --format hf")
    return found | {
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        # llama.cpp multiplies by the paper's magnitude itself (ggml's rope_yarn).
        "rope.scaling.attn_factor": scaling.magnitude / (1.0 + 0.1 * float(np.log(scaling.factor))),
    }


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama3 scaling divides each of the H / 2 frequencies by: the tensor `rope_freqs.weight`."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    # Imported here: it loads JAX.
    from jaxgpt.ops import rope_frequencies

    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return np.asarray(np.divide(plain, rope_frequencies(config)), np.float32)
