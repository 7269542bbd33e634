"""`jaxgpt inspect`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import first
from jaxgpt.settings import InspectSettings
from jaxgpt.verbs.output import Output, waiting

if TYPE_CHECKING:
    from jaxgpt.tensor_statistics import TensorStatistics

LEFT_OUT = {"parameters", "provenance", "tokenizer", "metadata", "settings"}
"""Of the description, what people get in other lines."""


@dataclass(frozen=True)
class _Seen:
    """What was found without reading more than headers, unless more was asked for."""

    description: dict[str, Any]
    arrays: Mapping[str, Any]
    """By name; of files views, whose values nobody has read yet."""
    listed: Mapping[str, dict[str, Any]] | None = None
    """Shape and dtype by name, where the file tells them."""


def inspect(settings: InspectSettings, output: Output) -> int:
    """What a folder or a file of tensors holds; exit code 1 if a tensor cannot be right.

    Arrays are read for `--tensors` only; of a model's folder JSON always has their statistics.
    """
    with waiting("reading"):
        seen = _seen(Path(settings.directory), settings.tensors, output)
        is_model, is_gguf = seen.listed is None, seen.description.get("format") == "gguf"
        wanted = settings.tensors or (output.json and is_model)
        found = _statistics(seen.arrays) if wanted and not is_gguf else []
        wrong = _mislabelled(seen.arrays)
    alarms = sum(bool(entry.alarm) for entry in found) + bool(wrong)
    if output.json:
        numbers = {entry.name: _json(entry) for entry in found}
        by_name = {name: {**entry, **numbers.get(name, {})} for name, entry in (seen.listed or numbers).items()}
        output.result({**seen.description, "parameters": by_name, "alarms": alarms, "mislabelled": wrong or None})
        return 1 if alarms else 0
    _describe(seen.description, output)
    computed = {entry.name for entry in found}
    listed = {name: entry for name, entry in (seen.listed or {}).items() if name not in computed}
    _list(listed if settings.tensors or not is_gguf else {}, output)
    _table(found, output)
    if wrong:
        output.say(f"ALARM: {wrong}")
    return 1 if alarms else 0


def _seen(place: Path, tensors: bool, output: Output) -> _Seen:
    from jaxgpt import step_folder
    from jaxgpt.formats import tensor_files

    if (place / "config.json").is_file():
        return _hugging_face(place, tensors or output.json, output)
    file = None if step_folder.is_checkpoint(place) else tensor_files.the_file(place)
    if file is None:
        return _checkpoint(place, tensors or output.json)
    return _gguf(file) if tensor_files.is_gguf(file) else _tensor_file(file, tensors)


def _checkpoint(directory: Path, tensors: bool) -> _Seen:
    from jaxgpt import checkpoint

    description = checkpoint.describe(directory)
    return _Seen(description, checkpoint.load(directory).params if tensors else {})


def _hugging_face(directory: Path, tensors: bool, output: Output) -> _Seen:
    from jaxgpt import step_folder
    from jaxgpt.formats import hf

    found = hf.read(directory, every_value=tensors)
    wrong = _mislabelled(found.params)
    for notice in found.notices:
        if notice != wrong:  # said as an alarm
            output.note(notice)
    description: dict[str, Any] = {
        "path": str(directory.absolute()),
        "format": "hf",
        "model_type": found.model_type,
        **found.config.to_dict(),
        "dtype": found.dtype,
        "eos_token_ids": found.eos_token_ids,
        "parameter_count": sum(math.prod(array.shape) for array in found.params.values()),
        "tokenizer": step_folder.tokenizer_summary(found.tokenizer),
        "template": found.template and found.template.name,
    }
    return _Seen(description, found.params)


def _tensor_file(path: Path, tensors: bool) -> _Seen:
    from jaxgpt.formats import tensor_files

    found = tensor_files.read(path, every_value=tensors)
    description = {"path": str(path.absolute()), "format": found.format, **found.summary(), "settings": found.settings}
    listed = {n: {"shape": list(array.shape), "dtype": str(array.dtype)} for n, array in found.tensors.items()}
    return _Seen(description, found.tensors, listed)


def _gguf(path: Path) -> _Seen:
    """What a GGUF file declares; of its tensors none that is quantised can be read."""
    from jaxgpt.formats import gguf_header

    found = gguf_header.read(path)
    tensors = {t.name: {"shape": list(t.shape), "dtype": t.dtype, "bytes": t.size} for t in found.tensors}
    description: dict[str, Any] = {
        "path": str(path.absolute()),
        "format": "gguf",
        "gguf_version": found.version,
        "parameter_count": sum(math.prod(t.shape) for t in found.tensors),
        "tensor_count": len(tensors),
        "metadata": {key: _metadata_json(value) for key, value in found.metadata.items()},
    }
    return _Seen(description, gguf_header.views(path, found), tensors)


def _mislabelled(arrays: Mapping[str, Any]) -> str:
    from jaxgpt.formats.mislabelled import mislabelled

    return mislabelled(arrays)


def _metadata_json(value: Any) -> Any:
    from jaxgpt.formats.gguf_header import Array

    return {"length": value.length, "first": value.first} if isinstance(value, Array) else value


def _metadata_text(value: Any) -> str:
    if isinstance(value, dict):
        more = " …" if value["length"] > len(value["first"]) else ""
        return f"{value['length']:,} values: {' '.join(map(repr, value['first']))}{more}"
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
            output.say(f"{key:<26}{_shown(key, value)}")
    tokenizer = description.get("tokenizer")
    if tokenizer:
        output.say(f"{'tokenizer':<26}{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens")
        for name, special in tokenizer["specials"].items():
            output.say(f"  {name:<24}{special['id']} {special['text']}")
        if added := tokenizer["added"]:
            output.say(f"  {'added tokens':<24}{len(added):,}: {first([repr(text) for text in added])}")
    for group in ("provenance", "settings"):
        values: Mapping[str, Any] = description.get(group) or {}
        width = max(25, _width(f"{group}.{key}" for key in values) - 1)
        for key, value in values.items():
            if isinstance(value, dict) and key.startswith("hf_"):
                value = f"{len(value)} values, written again by export --format hf"
            output.say(f"{f'{group}.{key}':<{width}} {value}")
    for key, value in description.get("metadata", {}).items():
        output.say(f"{key:<46}{_metadata_text(value)}")


def _shown(key: str, value: Any) -> Any:
    if key in ("parameter_count", "value_count"):
        return f"{value:,}"
    return ", ".join(f"{count}× {dtype}" for dtype, count in value.items()) if key == "dtypes" else value


def _list(listed: Mapping[str, Mapping[str, Any]], output: Output) -> None:
    shapes = {name: _times(entry["shape"]) for name, entry in listed.items()}
    names, sizes = _width(listed), _width(shapes.values())
    for name, entry in listed.items():
        output.say(f"{name:<{names}}{shapes[name]:<{sizes}}{entry['dtype']}")


def _width(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0) + 2


def _times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _table(found: "list[TensorStatistics]", output: Output) -> None:
    names, sizes = _width(entry.name for entry in found), _width(_times(entry.shape) for entry in found)
    for entry in found:
        numbers = f"mean {entry.mean:+.3e}  std {entry.std:.3e}  min {entry.min:+.3e}  max {entry.max:+.3e}"
        first = " ".join(f"{value:+.4f}" for value in entry.first)
        output.say(f"{entry.name:<{names}}{_times(entry.shape):<{sizes}}{entry.dtype:<10}{numbers}  first {first}")
        if entry.alarm:
            output.say(f"  ALARM: {entry.alarm}")
