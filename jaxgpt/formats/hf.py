"""Hugging Face model folders: config.json, weights, tokenizer files.

What another program wrote is taken exactly or refused: every tensor must be one of
the model's, dtypes are those of the tensors' own headers, and what is left out is said.
"""

import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxgpt import checkpoint, config, manifest, weights
from jaxgpt.chat import Template
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError, first
from jaxgpt.formats import hf_settings, hf_tokenizer, hf_weights, safetensors_file
from jaxgpt.formats.folder_links import refuse_links_outside
from jaxgpt.formats.hf_weights import WEIGHTS
from jaxgpt.formats.mislabelled import mislabelled
from jaxgpt.step_folder import GOLDEN
from jaxgpt.tokenizer import Tokenizer

_BUFFER = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Constants that old files carry beside the parameters."""


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face folder in jaxgpt's terms."""

    model_type: str
    """As config.json says; the config alone does not tell a Mistral without a window from a Llama."""
    config: ModelConfig
    params: dict[str, np.ndarray]
    """Views of the mapped files, in the dtypes of their headers."""
    tensors: dict[str, np.ndarray]
    """The same by Hugging Face name, in Hugging Face's layout."""
    dtype: str
    """That of most parameters."""
    eos_token_ids: list[int]
    tokenizer: Tokenizer | None
    template: Template | None
    """The chat template whose tokens the tokenizer has, where there is one."""
    notices: list[str] = field(default_factory=list[str])
    """Lines the caller should print: what was left out or looks odd."""
    kept: dict[str, Any] = field(default_factory=dict[str, Any])
    """For provenance: see `hf_settings.kept`."""


# -- Reading ---------------------------------------------------------------------------


def read(
    folder: str | Path, overrides: Mapping[str, Any] = MappingProxyType({}), *, every_value: bool = True
) -> HFModel:
    """Read a folder of any type in `config.ARCHITECTURES`, single or sharded, float32, bfloat16 or float16.

    Args:
        folder: with config.json and safetensors or pytorch_model.bin.
        overrides: keys of config.json whose values are replaced.
        every_value: look at each for NaN and, in pytorch_model.bin, damage; else only at headers and samples.

    Raises:
        InputError: a file that is missing, damaged or lies; an architecture jaxgpt does
            not have; tensors that are not exactly the model's.
    """
    folder = Path(folder)
    notices: list[str] = []
    refuse_links_outside(folder)
    hf = hf_settings.read(folder, overrides)
    source, found = hf_weights.read(folder, every_value=every_value)
    tensors = _parameters(found, source, notices)
    if hf.get("model_type") == "gpt2" and not any(name.startswith("transformer.") for name in tensors):
        tensors = {name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in tensors.items()}
    changed = f" with {first([f'--set {key}' for key in overrides])}" if overrides else ""
    model_config, params = translated(
        hf, tensors, source, notices, every_value=every_value, settings=hf_settings.CONFIG + changed
    )
    eos = hf_settings.eos_token_ids(hf, folder, model_config.vocab_size, notices)
    tokenizer, template = hf_tokenizer.read(folder, model_config.vocab_size, notices, tuple(eos))
    dtype, model_type = most_common_dtype(params), hf["model_type"]
    kept = hf_settings.kept(hf, folder, model_config)
    return HFModel(model_type, model_config, params, tensors, dtype, eos, tokenizer, template, notices, kept)


def translated(
    hf: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    source: str,
    notices: list[str],
    *,
    every_value: bool = True,
    settings: str = hf_settings.CONFIG,
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A config.json's content and its tensors as ours; a repeated tied head is taken out of `tensors`.

    Args:
        hf: the content of config.json.
        tensors: by Hugging Face name.
        source: the file that messages name.
        notices: lines the caller should print are added.
        every_value: look at each for NaN.
        settings: what messages call the place that `hf` is from.

    Raises:
        InputError: an architecture jaxgpt does not have, or tensors that are not exactly the model's.
    """
    try:
        model_config = config.from_hf(hf)
    except InputError as error:
        raise InputError(str(error).replace("config.json", settings, 1)) from None
    _drop_tied_head(model_config, tensors, notices)
    if model_config.num_hidden_layers > len(tensors):
        # Before the names of that many layers are spelled out.
        layers = f"{model_config.num_hidden_layers:,}"
        raise InputError(f"config.json has num_hidden_layers={layers}, {source} has {len(tensors)} tensors")
    try:
        params = weights.from_hf(model_config, tensors)
    except InputError as error:
        raise InputError(str(error).replace("the weights file", source, 1)) from None
    _say_oddities(hf, params, most_common_dtype(params), notices)
    bad = [name for name, array in params.items() if not _is_finite(array)] if every_value else []
    if bad:
        notices.append(f"{len(bad)} parameters hold NaN or infinity (first: {first(bad)})")
    return model_config, params


def most_common_dtype(params: Mapping[str, np.ndarray]) -> str:
    """The dtype of most arrays, by numpy's name."""
    return Counter(str(array.dtype) for array in params.values()).most_common(1)[0][0]


def _parameters(found: Mapping[str, np.ndarray], source: str, notices: list[str]) -> dict[str, np.ndarray]:
    """The tensors without constants; raises InputError for a dtype that parameters do not have."""
    tensors: dict[str, np.ndarray] = {}
    dropped: list[str] = []
    for name, tensor in found.items():
        if _BUFFER.search(name):
            dropped.append(name)
            continue
        if str(tensor.dtype) not in safetensors_file.DTYPES.values():
            known = ", ".join(safetensors_file.DTYPES.values())
            raise InputError(f"{source}: tensor {first([name])} is {tensor.dtype}; jaxgpt reads {known}")
        tensors[name] = tensor
    if dropped:
        notices.append(f"dropped {len(dropped)} constants that are no parameters ({first(sorted(dropped), 2)})")
    return tensors


def _drop_tied_head(model_config: ModelConfig, tensors: dict[str, np.ndarray], notices: list[str]) -> None:
    """A tied model's file may repeat the embedding as its head; nothing else may stand there."""
    if not model_config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    head = tensors.pop("lm_head.weight")
    embedding = "transformer.wte.weight" if "transformer.wte.weight" in tensors else "model.embed_tokens.weight"
    if embedding in tensors and head.tobytes() != tensors[embedding].tobytes():
        raise InputError(
            f"lm_head.weight differs from {embedding}, but config.json ties them; "
            "set tie_word_embeddings to false to keep both"
        )
    notices.append(f"dropped lm_head.weight, which repeats {embedding}")


def _say_oddities(hf: Mapping[str, Any], params: Mapping[str, np.ndarray], dtype: str, notices: list[str]) -> None:
    tag = hf.get("dtype") or hf.get("torch_dtype")
    if tag is not None and tag != dtype:
        notices.append(f"config.json says {tag}, the weights are {dtype}; their own dtype is used")
    mixed = sorted({str(array.dtype) for array in params.values()} - {dtype})
    if mixed:
        notices.append(f"some parameters are {' and '.join(mixed)}, most are {dtype}; each keeps its own")
    wrong = mislabelled(params)
    if wrong:
        notices.append(wrong)


_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def _is_finite(array: np.ndarray) -> bool:
    """By the bits, ten times as fast as `np.isfinite`: of either sign, infinity and NaN are the largest integers."""
    signed, unsigned = array.view(f"i{array.itemsize}"), array.view(f"u{array.itemsize}")
    sign = 1 << (8 * array.itemsize - 1)
    return max(int(signed.max()), int(unsigned.max()) - sign) < _INFINITY[str(array.dtype)]


# -- Writing ---------------------------------------------------------------------------


def write(source: Checkpoint, out: str | Path, golden: str | None = None) -> list[str]:
    """Write a folder that stock transformers loads; tensors keep their dtype. Lines the caller should print.

    Args:
        source: the model.
        out: the folder.
        golden: the text of golden.json, which other programs pass over.

    Raises:
        InputError: the architecture has no Hugging Face type, or OUT exists and is not empty.
    """
    out = Path(out).absolute()
    config.hf_model_type(source.config)
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        notices = _write_files(source, partial)
        if golden is not None:
            (partial / GOLDEN).write_text(golden, "utf-8")
        for path in partial.iterdir():
            manifest.sync(path)
        manifest.sync(partial)
        partial.rename(out)
        manifest.sync(out.parent)
    except OSError as error:
        raise InputError(f"{out} was not written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notices


def refuse_existing(out: Path) -> None:
    """Raise InputError unless there is nothing at `out`, or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; choose another")


def _write_files(source: Checkpoint, folder: Path) -> list[str]:
    tensors = weights.to_hf(source.config, source.params)
    safetensors_file.write(folder / WEIGHTS, tensors)
    dtype = Counter(str(tensor.dtype) for tensor in tensors.values()).most_common(1)[0][0]
    settings, generation = hf_settings.written(source, dtype)
    _write_json(folder / hf_settings.CONFIG, settings)
    _write_json(folder / hf_settings.GENERATION, generation)
    if source.tokenizer is None:
        return ["no tokenizer written: the checkpoint has none"]
    return hf_tokenizer.write(source.tokenizer, source.template, folder, source.config.max_position_embeddings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


# -- Command ---------------------------------------------------------------------------


def export_hf(
    directory: str | Path, out: str | Path, *, cast: Literal["float32", "bfloat16", "float16"] | None = None
) -> list[str]:
    """Make a Hugging Face folder of a checkpoint, in its own dtype or `cast`; lines the caller should print.

    The golden prompts go with it; a step that has none, or is cast, is asked now.

    Raises:
        InputError: as `checkpoint.load` and `write` do.
    """
    refuse_existing(Path(out))
    source = checkpoint.load(directory, cast=cast)
    golden, notices = None, list[str]()
    if cast is None and (source.path / GOLDEN).is_file():
        golden = (source.path / GOLDEN).read_text("utf-8")
    else:
        from jaxgpt import golden_prompts  # JAX, which files alone do not need

        golden, notice = golden_prompts.answered(replace(source, compute_dtype=cast or source.compute_dtype))
        notices += [notice] if notice else []
    return [*write(source, out, golden), *notices]
