"""What must hold before anything heavy begins: the same kind of model on both sides, and memory for both."""

import json
import math
import reprlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jaxgpt import checkpoint, step_folder, weights
from jaxgpt.array_files import in_bytes
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig, hf_model_type
from jaxgpt.errors import InputError
from oracle import memory, probe, training_probe
from oracle.reference import DTYPES, Reference

FAMILIES = {"gpt2": "gpt2"} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "llama")
"""By model type: tensors of one family have the same names and layouts."""
REMEDY = "give --reference the folder that the checkpoint's weights came from"
_SIZES: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "intermediate_size": ("intermediate_size", "n_inner"),
}
"""Sizes that decide the shapes of tensors, with the names that config.json may give them."""


def check(directory: Path, source: Path | None, dtype: str) -> None:
    """Refuse what no comparison can be made of, from headers alone.

    Args:
        directory: the checkpoint.
        source: the Hugging Face folder it is compared with, if any.
        dtype: the compute dtype of candidate and peer.

    Raises:
        InputError: no such checkpoint, a folder of another model, or too little memory.
    """
    described = checkpoint.describe(directory)
    config = ModelConfig.from_dict({key: described[key] for key in ModelConfig.__dataclass_fields__})
    _refuse_too_small(config)
    if source is not None:
        _refuse_another_model(config, source)
    _refuse_too_large(config, described["parameters"], dtype)


def _refuse_too_small(config: ModelConfig) -> None:
    """One position has nothing to attend to or predict, and one token no other to be compared with."""
    for name, what in (("vocab_size", "tokens"), ("max_position_embeddings", "positions")):
        if getattr(config, name) < 2:
            raise InputError(
                f"the checkpoint has {name} {getattr(config, name)}: too small to compare, which takes 2 {what} at "
                "least; give a larger model"
            )


# -- The same kind of model ------------------------------------------------------------


def _refuse_another_model(config: ModelConfig, source: Path) -> None:
    _refuse_pipes(source)
    family, found = hf_model_type(config), _config(source)
    _refuse_absurd(source, found)
    theirs = found.get("model_type")
    if not isinstance(theirs, str) or theirs not in FAMILIES:
        raise InputError(f"{source} is a model of type {reprlib.repr(theirs)}; the oracle knows {', '.join(FAMILIES)}")
    if FAMILIES[theirs] != FAMILIES[family]:
        raise InputError(f"{source} is a {theirs} model, the checkpoint a {family} model; {REMEDY}")
    for name, keys in _SIZES.items():
        size = next((found[key] for key in keys if found.get(key) is not None), None)
        if size is not None and size != getattr(config, name):
            raise InputError(f"{source} has {name} {_count(size)}, the checkpoint {getattr(config, name):,}; {REMEDY}")
    positions = found.get("n_positions")
    if theirs == "gpt2" and isinstance(positions, int) and positions < config.max_position_embeddings:
        ours = f"{config.max_position_embeddings:,}"
        raise InputError(f"{source} has {positions:,} learned positions, the checkpoint {ours}; {REMEDY}")


def _refuse_pipes(source: Path) -> None:
    """Opening a pipe waits for whoever writes into it, and a device may never end."""
    for path in source.iterdir() if source.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is a pipe or device, not a file; give a folder of model files")


def _refuse_absurd(source: Path, found: Mapping[str, Any]) -> None:
    """Values for which the reference would put a default, or that no tokenizer could have."""
    positions = found.get("max_position_embeddings", 1)
    if type(positions) is not int or positions < 1:
        raise InputError(f"{source}: max_position_embeddings is {reprlib.repr(positions)}; expected 1 or more")
    for name in ("config.json", "generation_config.json"):
        ids = (found if name == "config.json" else _optional(source / name)).get("eos_token_id")
        if any(type(id) is not int for id in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
            raise InputError(
                f"{source / name}: eos_token_id is {reprlib.repr(ids)}; expected an integer or a list of them"
            )


def _optional(path: Path) -> Mapping[str, Any]:
    return _object(path) if path.is_file() else {}


def _count(size: object) -> str:
    return f"{size:,}" if isinstance(size, int) and abs(size) < 1 << 63 else reprlib.repr(size)


def _config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.exists():
        refuse_checkpoint(source)
        raise InputError(
            f"{source} has no config.json; --reference takes a Hugging Face model folder; "
            "without it the checkpoint's own export is compared"
        )
    return _object(path)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --reference takes a Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON; restore it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object; restore it")
    return found


def refuse_checkpoint(source: Path) -> None:
    """Where a Hugging Face folder is expected and none is there.

    Raises:
        InputError: it is a checkpoint of jaxgpt.
    """
    if step_folder.is_checkpoint(source):
        remedy = f"`jaxgpt export {source} DIR --format hf` makes one of it"
        raise InputError(f"{source} is a jaxgpt checkpoint; --reference takes a Hugging Face model folder: {remedy}")


def refuse_not_finite(reference: Reference, source: Path) -> None:
    """Refuse a folder that no model could be compared with.

    Raises:
        InputError: a parameter of it holds NaN or infinity.
    """
    for name, parameter in reference.peer.decoder.named_parameters():
        wrong = sum(int((~torch.isfinite(part)).sum()) for part in parameter.detach().reshape(-1).split(_PART))
        if wrong:
            raise InputError(f"{source}: {wrong:,} values of {name} are NaN or infinite; a reference must be whole")


_PART = 1 << 22
"""Values looked at at once."""


# -- Room ------------------------------------------------------------------------------

FIXED = 1 << 30
"""Bytes that the programs and their compilers take, those of every rung together, whatever the model."""
MAKE_ROOM = "make room there, or set TMPDIR to a folder with more"
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def _refuse_too_large(config: ModelConfig, parameters: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    free, need = memory.available(), needed(config, parameters, dtype)
    if free is not None and need > free:
        count = sum(map(_count_of, parameters.values()))
        raise InputError(
            f"comparing {count:,} parameters in {dtype} needs about {in_bytes(need)} of memory, {in_bytes(free)} are "
            "free; close other programs, or compare on a larger machine"
        )


def needed(config: ModelConfig, parameters: Mapping[str, Mapping[str, Any]], dtype: str) -> int:
    """Bytes that a comparison takes at its peak, about.

    The candidate as stored and in its compute dtype, the peer in that dtype, the truth in
    float64, and beside them what the hungriest rung takes: the files a second time with
    all activations of the candidate on the longest probe and the logits of every side;
    the gradients; or the optimizer's states.
    """
    stored = sum(_count_of(p) * _WIDTH[p["dtype"]] for p in parameters.values())
    count = sum(map(_count_of, parameters.values()))
    computed = count * DTYPES[dtype].itemsize
    cast = computed if any(p["dtype"] != dtype for p in parameters.values()) else 0
    held = stored + cast + computed + 8 * count
    master = 4 * count if dtype != "float32" else 0
    return FIXED + held + max(stored + _activations(config), master + _gradients(config, count), _states(config))


def _gradients(config: ModelConfig, count: int) -> int:
    """Those of candidate and peer in float32; the truth's go layer by layer, the last with embedding and head."""
    return 8 * count + 2 * 8 * config.vocab_size * config.hidden_size


def _states(config: ModelConfig) -> int:
    """Of the optimizer, for the part of the model that it is compared on."""
    part = training_probe.part_of(config) if training_probe.is_large(config) else config
    return _OF_AN_OPTIMIZED * sum(math.prod(parameter.shape) for parameter in weights.parameters(part))


_OF_AN_OPTIMIZED = 200
"""Bytes a parameter: truth, divisors, peer and candidate after each compared step, and the moments of the step."""


def _activations(config: ModelConfig) -> int:
    tokens = min(probe.LONG, config.max_position_embeddings)
    attention = 3 * config.num_attention_heads * tokens
    layer = attention + 12 * config.hidden_size + 3 * config.intermediate_size
    return tokens * (4 * config.num_hidden_layers * layer + _OF_A_LOGIT * config.vocab_size)


_OF_A_LOGIT = 36
"""Bytes: candidate and three draws of the peer in float32, the truth twice in float64, and part of the difference."""


def _count_of(parameter: Mapping[str, Any]) -> int:
    return math.prod(parameter["shape"])


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Where the checkpoint is exported to.

    Raises:
        InputError: no such folder can be made.
    """
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise InputError(f"no temporary folder can be made: {error.strerror}; {MAKE_ROOM}") from error


def require_space(place: Path, loaded: Checkpoint) -> None:
    """Before the checkpoint is exported.

    Raises:
        InputError: the disk of `place` has too little room for its weights.
    """
    need, free = sum(array.nbytes for array in loaded.params.values()), shutil.disk_usage(place).free
    if need > free:
        where = tempfile.gettempdir()
        raise InputError(f"the export needs {in_bytes(need)} in {where}, {in_bytes(free)} are free; {MAKE_ROOM}")
