"""Tensors of a Hugging Face folder, read and named a second time.

The importer and the exporter of the product go through `jaxgpt.weights`; a mistake
in that table would cancel if this check used it. So here the files are read by
safetensors itself and the names and layouts are written down again, from
transformers' modelling code, as rules.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import InputError

BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Constants that old files carry beside the parameters."""


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor under its name and in the dtype of its file, buffers left out.

    Raises:
        InputError: the folder has no readable safetensors file.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if not BUFFERS.search(name)]  # noqa: SIM118 (not a mapping)
                tensors |= {name: _numpy(opened.get_tensor(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    return tensors


def _files(folder: Path) -> list[Path]:
    """The one file where there is one, whatever an index beside it says: transformers reads that."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name or name == "..")
    except OSError as error:
        raise InputError(f"{index} cannot be read: {error.strerror}; restore it") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is no index with a weight_map from tensors to files; restore it") from error
    if outside:
        raise InputError(f"{index} names {outside[0]}, outside the model directory; refused")
    if not names:
        raise InputError(f"{index} has an empty weight_map; restore it")
    return [folder / name for name in sorted(names)]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def parameters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as jaxgpt's parameters should be: their names, kernels (in, out).

    A tensor that no rule knows keeps its own name, so that it is seen to be left over.
    """
    is_gpt2 = any(name.endswith("attn.c_attn.weight") for name in tensors)
    rules = _gpt2 if is_gpt2 else _llama
    return {ours: array for name, tensor in tensors.items() for ours, array in rules(name, tensor)}


_GPT2_MODULES = {
    "ln_1": "attn_norm",
    "attn.c_proj": "attn.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_LLAMA_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "self_attn.o_proj": "attn.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_OUTSIDE = {
    "wte.weight": "embed.tokens.weight",
    "wpe.weight": "embed.positions.weight",
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
    "embed_tokens.weight": "embed.tokens.weight",
    "norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
}


def _gpt2(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """GPT-2: Conv1D stores (in, out); c_attn holds query, key and value side by side."""
    bare = name.removeprefix("transformer.")
    match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", bare)
    if match is None:
        yield _OUTSIDE.get(bare, name), tensor
        return
    layer, module, leaf = match.groups()
    leaf = "kernel" if leaf == "weight" and tensor.ndim == 2 else leaf
    if module == "attn.c_attn":
        width = tensor.shape[-1] // 3
        for index, part in enumerate("qkv"):
            yield f"layers.{layer}.attn.{part}.{leaf}", tensor[..., index * width : (index + 1) * width]
    else:
        yield _named(_GPT2_MODULES, name, layer, module, leaf), tensor


def _llama(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Llama, Mistral and Qwen: Linear stores (out, in)."""
    bare = name.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", bare)
    if match is None:
        yield _OUTSIDE.get(bare, name), tensor
        return
    layer, module, leaf = match.groups()
    if leaf == "weight" and tensor.ndim == 2:
        yield _named(_LLAMA_MODULES, name, layer, module, "kernel"), tensor.T
    else:
        yield _named(_LLAMA_MODULES, name, layer, module, leaf), tensor


def _named(modules: Mapping[str, str], name: str, layer: str, module: str, leaf: str) -> str:
    return f"layers.{layer}.{modules[module]}.{leaf}" if module in modules else name
