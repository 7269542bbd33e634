"""A Hugging Face folder, or a config alone, as a model.

The folder's tensors must be exactly the model's: nothing missing (transformers
would draw it at random), nothing left over, every shape equal.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from torchref.config import GPT2Config, LoadError, listed, read
from torchref.decoder import Decoder
from torchref.gpt2 import GPT2LMHead
from torchref.llama import LlamaForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def build(config: Mapping[str, Any]) -> Decoder:
    """A float32 model of a config.json's content, initialised from torch's generator.

    Matrices are normal with the config's `initializer_range`, biases 0, norms 1.

    Raises:
        LoadError: the config is not one this reference implements.
    """
    model = _empty(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=model.config.initializer_range)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def _refuse_absent_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Before modules are built for a number of layers that no file could hold."""
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    if isinstance(layers, int) and layers > tensors:
        raise LoadError(f"config.json has {layers:,} layers, the weights are {tensors:,} tensors; restore the folder")


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The model of a folder with config.json and safetensors, whole or in shards.

    Args:
        folder: path of the folder; GPT-2 files with the hub's names (no `transformer.`) are understood.
        dtype: what to run in; by default the dtype in the file's header.

    Raises:
        LoadError: what is missing, left over, misshapen or not supported.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    with ExitStack() as stack:
        slices = _open(folder, stack)
        _refuse_absent_layers(config, len(slices))
        with torch.device("meta"):
            model = _empty(config)
        slices = _gpt2_names(slices) if isinstance(model, GPT2LMHead) else _without_frequencies(slices)
        _refuse_not_real(slices)
        _check(model, {name: tuple(slice.get_shape()) for name, slice in slices.items()})
        dtype = dtype or _dtype(slices)
        tensors = {name: slice[...].to(dtype) for name, slice in slices.items()}
    embedding = _embedding(model)
    if model.config.tie_word_embeddings:
        if not torch.equal(tensors.get("lm_head.weight", tensors[embedding]), tensors[embedding]):
            raise LoadError(f"config.json ties the head, but lm_head.weight differs from {embedding}")
        tensors["lm_head.weight"] = tensors[embedding]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie()  # assignment gave the two names a parameter each
    return model


def _empty(config: Mapping[str, Any]) -> GPT2LMHead | LlamaForCausalLM:
    parsed = read(config)
    return (GPT2LMHead(parsed) if isinstance(parsed, GPT2Config) else LlamaForCausalLM(parsed)).eval()


def _embedding(model: Decoder) -> str:
    return "transformer.wte.weight" if isinstance(model, GPT2LMHead) else "model.embed_tokens.weight"


def _json(path: Path) -> dict[str, Any]:
    _refuse_pipe(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no {path.name}; expected a Hugging Face model folder") from None
    except RecursionError:
        raise LoadError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _refuse_pipe(path: Path) -> None:
    """Opening a pipe waits for whoever writes into it, and a device may never end."""
    if path.exists() and not path.is_file():
        raise LoadError(f"{path} is a folder, pipe or device, not a file")


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of the folder by name, opened but not read."""
    slices: dict[str, Any] = {}
    for name in _files(folder):
        _refuse_pipe(folder / name)
        try:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / name} cannot be read as safetensors: {error}") from None
        twice = sorted(slices.keys() & set(file.keys()))
        if twice:
            raise LoadError(f"{name} repeats tensors of another shard: {listed(twice)}")
        slices |= {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (not a mapping)
    return slices


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise LoadError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; other weight formats are not read: "
            "load it with transformers and save it again with save_pretrained"
        )
    names = _json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LoadError(f"{folder / INDEX} has no weight_map from tensors to files")
    shards = sorted(set(names.values()))
    for shard in shards:
        if shard != Path(shard).name or "\\" in shard or shard == ".." or "\0" in shard:
            raise LoadError(f"{INDEX} names {shard}, outside the model directory; refused")
        if not (folder / shard).is_file():
            raise LoadError(f"{INDEX} names {shard}, which {folder} lacks")
    return shards


def _gpt2_names(slices: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's GPT-2 as saved from the bare model: no prefix, and the causal mask as a buffer."""
    buffer = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
    kept = {name: slice for name, slice in slices.items() if not buffer.fullmatch(name)}
    if any(name.startswith("transformer.") for name in kept):
        return kept
    return {name if name == "lm_head.weight" else f"transformer.{name}": slice for name, slice in kept.items()}


def _without_frequencies(slices: Mapping[str, Any]) -> dict[str, Any]:
    """Old Llama files carry RoPE's frequencies as buffers; they follow from the config."""
    buffer = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
    return {name: slice for name, slice in slices.items() if not buffer.fullmatch(name)}


def _refuse_not_real(slices: Mapping[str, Any]) -> None:
    """Integers converted to floats would load, and be another model."""
    wrong = [f"{name} ({slice.get_dtype()})" for name, slice in slices.items() if slice.get_dtype() not in _DTYPES]
    if wrong:
        raise LoadError(f"the weights hold what is not {', '.join(_DTYPES)}: {listed(wrong)}; convert them")


def _check(model: Decoder, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly the model's; a tied head may be left out."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set[str]()
    missing = [name for name in expected if name not in found and name not in optional]
    extra = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} (file {list(found[name])}, model {list(shape)})"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    problems = [
        f"{problem} {listed(names)}"
        for problem, names in (
            (f"lack {len(missing)} of {len(expected)} tensors:", missing),
            (f"have {len(extra)} tensors the model does not:", extra),
            ("have other shapes:", misshapen),
        )
        if names
    ]
    if problems:
        raise LoadError("the weights " + "; ".join(problems))


def _dtype(slices: Mapping[str, Any]) -> torch.dtype:
    found = sorted({slice.get_dtype() for slice in slices.values()})
    if len(found) != 1 or found[0] not in _DTYPES:
        raise LoadError(f"the weights are {', '.join(found)}; expected one of {', '.join(_DTYPES)}: pass a dtype")
    return _DTYPES[found[0]]
