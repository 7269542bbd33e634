"""`jaxgpt inspect`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.formats.gguf_header import Array
from jaxgpt.settings import InspectSettings
from jaxgpt.verbs.output import Output, waiting

if TYPE_CHECKING:
    from jaxgpt.tensor_statistics import TensorStatistics

LEFT_OUT = {"parameters", "provenance", "tokenizer"}
"""Of the description, what people get in other lines."""


def inspect(settings: InspectSettings, output: Output) -> int:
    """What a folder or GGUF file holds; exit code 1 if a tensor cannot be right.

    The text form reads arrays for `--tensors` only; JSON always has their statistics.
    """
    if Path(settings.directory).is_file():
        return _gguf(settings, output)
    is_hf = (Path(settings.directory) / "config.json").is_file()
    with waiting("reading"):
        read = _hugging_face if is_hf else _checkpoint
        description, params = read(settings.directory, tensors=settings.tensors or output.json, output=output)
        found = _statistics(params)
    if output.json:
        by_name = {entry.name: _json(entry) for entry in found}
        output.result({**description, "parameters": by_name, "alarms": sum(bool(entry.alarm) for entry in found)})
    else:
        _describe(description, output)
        _table(found, output)
    return 1 if any(entry.alarm for entry in found) else 0


def _checkpoint(directory: str, *, tensors: bool, output: Output) -> tuple[dict[str, Any], Mapping[str, Any]]:
    from jaxgpt import checkpoint

    description = checkpoint.describe(directory)
    return description, checkpoint.load(directory).params if tensors else {}


def _hugging_face(directory: str, *, tensors: bool, output: Output) -> tuple[dict[str, Any], Mapping[str, Any]]:
    from jaxgpt.formats import hf

    found = hf.read(directory)
    for notice in found.notices:
        output.note(notice)
    description: dict[str, Any] = {
        "path": str(Path(directory).absolute()),
        "format": "hf",
        **found.config.to_dict(),
        "dtype": found.dtype,
        "eos_token_ids": found.eos_token_ids,
        "parameter_count": sum(math.prod(array.shape) for array in found.params.values()),
        "template": found.template and found.template.name,
    }
    return description, found.params if tensors else {}


def _gguf(settings: InspectSettings, output: Output) -> int:
    """What a GGUF file declares; its tensors are not read."""
    from jaxgpt.formats import gguf_header

    path = Path(settings.directory)
    found = gguf_header.read(path)
    tensors = {t.name: {"shape": list(t.shape), "dtype": t.dtype, "bytes": t.size} for t in found.tensors}
    description: dict[str, Any] = {
        "path": str(path.absolute()),
        "format": "gguf",
        "gguf_version": found.version,
        "parameter_count": sum(math.prod(t.shape) for t in found.tensors),
        "tensor_count": len(tensors),
    }
    if output.json:
        metadata = {key: _metadata_json(value) for key, value in found.metadata.items()}
        output.result({**description, "metadata": metadata, "parameters": tensors})
        return 0
    _describe(description, output)
    for key, value in found.metadata.items():
        output.say(f"{key:<46}{_metadata_text(value)}")
    for tensor in found.tensors if settings.tensors else ():
        output.say(f"{tensor.name:<34}{'×'.join(map(str, tensor.shape)):<16}{tensor.dtype}")
    return 0


def _metadata_json(value: Any) -> Any:
    return {"length": value.length, "first": value.first} if isinstance(value, Array) else value


def _metadata_text(value: Any) -> str:
    if isinstance(value, Array):
        more = " …" if value.length > len(value.first) else ""
        return f"{value.length:,} values: {' '.join(map(repr, value.first))}{more}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}… ({len(text):,} characters)"


def _statistics(params: Mapping[str, Any]) -> "list[TensorStatistics]":
    from jaxgpt.tensor_statistics import tensor_statistics

    return tensor_statistics(params)


def _json(entry: "TensorStatistics") -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(entry).items() if key != "name"}


def _describe(description: Mapping[str, Any], output: Output) -> None:
    for key, value in description.items():
        if key not in LEFT_OUT:
            shown = f"{value:,}" if key == "parameter_count" else value
            output.say(f"{key:<26}{shown}")
    tokenizer = description.get("tokenizer")
    if tokenizer:
        output.say(f"{'tokenizer':<26}{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens")
        for name, special in tokenizer["specials"].items():
            output.say(f"  {name:<24}{special['id']} {special['text']}")
    for key, value in (description.get("provenance") or {}).items():
        output.say(f"{'provenance.' + key:<26}{value}")


def _table(found: "list[TensorStatistics]", output: Output) -> None:
    for entry in found:
        shape = "×".join(map(str, entry.shape))
        numbers = f"mean {entry.mean:+.3e}  std {entry.std:.3e}  min {entry.min:+.3e}  max {entry.max:+.3e}"
        first = " ".join(f"{value:+.4f}" for value in entry.first)
        output.say(f"{entry.name:<34}{shape:<12}{entry.dtype:<10}{numbers}  first {first}")
        if entry.alarm:
            output.say(f"  ALARM: {entry.alarm}")
