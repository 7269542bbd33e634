"""Checkpoints of PyTorch training scripts (nanoGPT's `ckpt.pt` and its relatives) as Hugging Face's config and tensors.

Such a file is a dict: the parameters under one key, the sizes of the model under
another, each script with its own names. What this module returns is what a Hugging Face
folder would hold, so that both are translated by the one config and the one name table.
Sources: nanoGPT train.py and model.py (layout, GELU, biases), llm.c train_gpt2.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened
from jaxgpt.formats import pt_file
from jaxgpt.formats.safetensors_file import DTYPES

_PARAMETERS = ("model", "model_state_dict", "state_dict")
_SETTINGS = ("model_args", "config", "cfg")
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|_forward_module\.)+")
_SETTING_NAMES = {
    alias: name
    for name, aliases in {
        "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "depth"),
        "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
        "n_embd": ("n_embd", "d_model", "hidden_size", "embed_dim", "dim"),
        "n_positions": (
            "n_positions",
            "block_size",
            "n_ctx",
            "context_length",
            "max_seq_len",
            "max_position_embeddings",
        ),
        "vocab_size": ("vocab_size", "padded_vocab_size"),
        "activation_function": ("activation_function", "hidden_act"),
        "layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps"),
        "dropout": ("dropout",),
    }.items()
    for alias in aliases
}
"""What training scripts call GPT-2's settings, and Hugging Face's name of each."""
_REWARD_HEAD = re.compile(r"^(reward_head|value_head|v_head|rm_head|score|reward|regression_head)\.")
_MASK = re.compile(r"(^|\.)attn\.(bias|masked_bias|mask|tril)$")
_LAYER = re.compile(r"^transformer\.h\.(\d+)\.")


@dataclass(frozen=True)
class PTModel:
    """What a Hugging Face folder of the same model would hold."""

    hf: dict[str, Any]
    """config.json."""
    tensors: dict[str, np.ndarray]
    """By Hugging Face name, in Hugging Face's layout: views of the mapped file."""
    notices: list[str]


def read(path: str | Path, overrides: Mapping[str, Any]) -> PTModel:
    """Read a GPT-2-class checkpoint of a training script.

    Args:
        path: the file.
        overrides: settings that replace the file's, by any of their names (`n_head`, `num_heads`, …).

    Raises:
        InputError: as `pt_file.read`; no parameters or no number of heads found; tensors
            of another architecture; an override that is no setting.
    """
    unknown = sorted(overrides.keys() - _SETTING_NAMES.keys())
    if unknown:
        known = ", ".join(sorted(set(_SETTING_NAMES.values())))
        raise InputError(f"--set {first(unknown)} is no setting of a .pt file; its settings are {known}")
    content = pt_file.read(path)
    notices: list[str] = []
    state = _state(Path(path), content)
    pt_file.refuse_repeated(Path(path), state)
    tensors = _named(state, notices)
    settings = _settings(content) | {_canonical(key): value for key, value in overrides.items()}
    tensors, is_linear = _in_conv1d_layout(tensors)
    hf = _config(Path(path), settings, tensors, is_linear, notices)
    _add_zero_biases(hf, tensors, notices)
    return PTModel(hf, tensors, notices)


def _state(path: Path, content: Any) -> dict[str, np.ndarray]:
    """The dict of parameters: under one of the usual keys, or the whole file."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    found = [content[key] for key in _PARAMETERS if isinstance(content.get(key), Mapping)]
    state = found[0] if found else content
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, np.ndarray)}
    if not tensors:
        keys = first([str(key)[:40] for key in content], 5)
        raise InputError(f"{path} has no tensors under {', '.join(_PARAMETERS)} or at its top; its keys are {keys}")
    return tensors


def _named(state: Mapping[str, np.ndarray], notices: list[str]) -> dict[str, np.ndarray]:
    """Parameters by Hugging Face's GPT-2 names; what is no part of the model is dropped, and said."""
    tensors: dict[str, np.ndarray] = {}
    dropped: dict[str, list[str]] = {"reward head": [], "attention masks": []}
    for full, tensor in state.items():
        name = _PREFIX.sub("", full)
        if _REWARD_HEAD.match(name):
            dropped["reward head"].append(full)
        elif _MASK.search(name) and tensor.ndim != 1:
            dropped["attention masks"].append(full)
        else:
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if str(tensor.dtype) not in DTYPES.values():
                raise InputError(f"{first([name])} is {tensor.dtype}; jaxgpt reads {', '.join(DTYPES.values())}")
            if name in tensors:
                both = f"{first([name])} twice, with and without a prefix ({first([full])})"
                raise InputError(f"the file has {both}; keep one")
            tensors[name] = tensor
    notices += [f"dropped {kind}: {first(sorted(names), 2)}" for kind, names in dropped.items() if names]
    return tensors


def _canonical(key: str) -> str:
    """Hugging Face's GPT-2 name of a setting, for whichever name a script gave it."""
    return _SETTING_NAMES.get(key, key)


def _settings(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The sizes that the file states; `model_args` before `config` before `cfg`, which may nest `model`."""
    found: dict[str, Any] = {}
    for key in reversed(_SETTINGS):
        group = content.get(key)
        if isinstance(group, Mapping):
            nested = group.get("model")
            for values in (group, nested if isinstance(nested, Mapping) else {}):
                found |= {_canonical(name): value for name, value in values.items() if isinstance(name, str)}
    known = set(_SETTING_NAMES.values())
    return {name: value for name, value in found.items() if name in known and isinstance(value, str | int | float)}


def _in_conv1d_layout(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
    """GPT-2's matrices as (in, out), and whether the file had torch's Linear, (out, in).

    `c_attn` tells them apart whatever the width: its two sides differ by a factor of 3.
    """
    first_attention = tensors.get("transformer.h.0.attn.c_attn.weight")
    if first_attention is None or first_attention.ndim != 2:
        raise InputError(
            "the file has no transformer.h.0.attn.c_attn.weight: only GPT-2's architecture is read from .pt files "
            f"(first: {first(sorted(tensors))}); save others in Hugging Face's folder format"
        )
    rows, columns = first_attention.shape
    if rows != 3 * columns:
        return tensors, False
    is_matrix = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
    return {name: tensor.T if is_matrix.search(name) else tensor for name, tensor in tensors.items()}, True


def _config(
    path: Path, settings: Mapping[str, Any], tensors: dict[str, np.ndarray], is_linear: bool, notices: list[str]
) -> dict[str, Any]:
    """config.json: sizes from the tensors themselves, the rest from the file's settings."""
    embedding, positions = (_matrix(tensors, f"transformer.{name}.weight") for name in ("wte", "wpe"))
    layers = {match.group(1) for name in tensors if (match := _LAYER.match(name))}
    measured = {
        "vocab_size": embedding[0],
        "n_embd": embedding[1],
        "n_positions": positions[0],
        "n_layer": len(layers),
    }
    wrong = [f"{name}={shortened(settings[name])}, its tensors say {value}" for name, value in measured.items()
             if settings.get(name, value) != value]  # fmt: skip
    if wrong:
        raise InputError(f"{path} has {first(wrong)}; correct it with --set")
    if "n_head" not in settings:
        raise InputError(f"{path} does not say its number of attention heads; give it with --set n_head=12")
    # nanoGPT's MLP has torch's exact GELU; Conv1D layout is Hugging Face's, whose GPT-2 has the tanh form.
    activation = "gelu" if is_linear else "gelu_new"
    if "activation_function" not in settings:
        notices.append(f"activation taken to be {activation} (--set activation_function=… changes it)")
    inner = tensors.get("transformer.h.0.mlp.c_fc.weight")
    return {
        "model_type": "gpt2",
        **measured,
        "n_head": settings["n_head"],
        "n_inner": inner.shape[1] if inner is not None and inner.ndim == 2 else None,
        "activation_function": settings.get("activation_function", activation),
        "layer_norm_epsilon": settings.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": _is_tied(tensors),
        **{name: settings.get("dropout", 0.0) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
    }


def _matrix(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 2:
        found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
        raise InputError(f"{name} {found}; expected a matrix of rows by width")
    rows, width = tensor.shape
    return rows, width


def _is_tied(tensors: Mapping[str, np.ndarray]) -> bool:
    head = tensors.get("lm_head.weight")
    return head is None or head.tobytes() == tensors["transformer.wte.weight"].tobytes()


def _add_zero_biases(hf: Mapping[str, Any], tensors: dict[str, np.ndarray], notices: list[str]) -> None:
    """nanoGPT's `bias=False` leaves out every bias; GPT-2 with biases of zero is the same function."""
    if any(name.endswith(".bias") for name in tensors):
        return
    added = 0
    for name, tensor in list(tensors.items()):
        if name.endswith((".wte.weight", ".wpe.weight")) or name == "lm_head.weight":
            continue
        width = tensor.shape[-1]
        tensors[name.removesuffix("weight") + "bias"] = np.zeros(width, tensor.dtype)
        added += 1
    notices.append(f"the model has no biases: {added} were added as zeros, which change nothing")
