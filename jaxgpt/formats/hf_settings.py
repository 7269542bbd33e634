"""config.json and generation_config.json: what is read of them, what is kept, and how they are written again.

A model's own values are `jaxgpt.config`'s. What changes nothing here but something in
another program (the ids it begins texts with, how it samples) is kept with the
checkpoint, under `provenance`, and written back.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt import config
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError, first
from jaxgpt.formats import json_file
from jaxgpt.hf_keys import HARMLESS, REQUIRED_VALUES

CONFIG, GENERATION = "config.json", "generation_config.json"
KEPT_CONFIG, KEPT_GENERATION = "hf_config", "hf_generation_config"
"""Their keys in a checkpoint's provenance."""
LINEAGE = ("model_type", KEPT_CONFIG, KEPT_GENERATION)
"""What a model that is trained further still is."""

_WINDOW = ("sliding_window", "max_window_layers", "layer_types")
_WRITTEN = ("model_type", "architectures", "dtype", "torch_dtype")
_TOKENS = ("bos_token_id", "pad_token_id")


def read(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, with some values replaced.

    RoPE's are found where they act: in `rope_parameters`, where there are any.

    Raises:
        InputError: a file that is not read, or `overrides` that say RoPE's values twice.
    """
    content = json_file.read(folder / CONFIG)
    merged: dict[str, Any] = {**content, **overrides}
    old = overrides.keys() & {"rope_theta", "rope_scaling"}
    if old and overrides.get("rope_parameters"):
        raise InputError(f"--set gives rope_parameters and {first(sorted(old))}; give one of them")
    parameters = content.get("rope_parameters")
    if not old or not isinstance(parameters, Mapping):
        return merged
    if "rope_scaling" in old:
        scaling = {"rope_type": "default"} if overrides["rope_scaling"] is None else overrides["rope_scaling"]
        theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
        parameters = {**theta, **scaling} if isinstance(scaling, Mapping) else scaling
    if "rope_theta" in old and isinstance(parameters, Mapping):
        parameters = {**parameters, "rope_theta": overrides["rope_theta"]}
    return {**merged, "rope_parameters": parameters}


def eos_token_ids(hf: Mapping[str, Any], folder: Path, vocab_size: int, notices: list[str]) -> list[int]:
    """Ids that end a text, by both files; those outside the vocabulary are said and left out."""
    found: list[int] = []
    for content in (hf, generation(folder)):
        found += [id for id in _ids(content.get("eos_token_id")) if id not in found]
    outside = [str(id) for id in found if not 0 <= id < vocab_size]
    if outside:
        notices.append(f"eos_token_id {first(outside)} is outside the vocabulary of {vocab_size:,}; ignored")
    return [id for id in found if 0 <= id < vocab_size]


def generation(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty where there is none."""
    return json_file.read(folder / GENERATION) if (folder / GENERATION).exists() else {}


def _ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(id) is not int for id in ids):
        raise InputError(f"eos_token_id must be an integer or a list of them, got {value!r}")
    return ids


def kept(hf: Mapping[str, Any], folder: Path, model_config: ModelConfig) -> dict[str, Any]:
    """For a checkpoint's provenance: what both files say that is no value of the model."""
    names = {*HARMLESS, *REQUIRED_VALUES} - {*_WRITTEN}
    if model_config.sliding_window is None:
        names |= {*_WINDOW}
    if hf.get("n_inner") is None:  # four times the width, said so
        names.add("n_inner")
    content = {key: value for key, value in hf.items() if key in names}
    return {KEPT_CONFIG: content, KEPT_GENERATION: generation(folder)}


def written(source: Checkpoint, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and of generation_config.json for a checkpoint whose weights are of `dtype`."""
    known, kinds = source.provenance.get("model_type"), config.hf_model_types(source.config)
    settings = config.to_hf(source.config, dtype, known if known in kinds else None)
    found: Mapping[str, Any] | None = source.provenance.get(KEPT_CONFIG)
    content, sampling = dict(found or {}), dict(source.provenance.get(KEPT_GENERATION) or {})
    if source.config.sliding_window is not None or "use_sliding_window" not in settings:
        content = {key: value for key, value in content.items() if key not in _WINDOW}
    if found is None:
        # Said, though nobody asked: transformers would put its own defaults in place of missing keys.
        begin = source.tokenizer.bos_ids if source.tokenizer else ()
        content["bos_token_id"] = begin[0] if begin else None
    for part in (content, sampling):
        for key in _TOKENS:
            if part.get(key) is not None and not _is_id(part[key], source.config.vocab_size):
                del part[key]
    ends = {"eos_token_id": _one_or_many(source.eos_token_ids)}
    said = [*_ids(content.get("eos_token_id")), *_ids(sampling.get("eos_token_id"))]
    if {id for id in said if _is_id(id, source.config.vocab_size)} != set(source.eos_token_ids) or not said:
        content, sampling = content | ends, sampling | ends
    return {**settings, **content}, sampling or ends


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _one_or_many(ids: list[int]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else ids or None
