"""Single files of tensors, looked at: what they are called, their shapes and dtypes, and what else a file carries.

Values stay on the disk until somebody reads them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import InputError, first
from jaxgpt.formats import gguf_header, pt_file, safetensors_file

_PT = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (*_PT, ".safetensors", ".gguf")
_DEPTH, _SETTINGS, _LONGEST = 6, 200, 200
"""How deep settings are looked for, how many are kept, and characters of one that are shown."""


@dataclass(frozen=True)
class TensorFile:
    """What a file holds."""

    format: str
    """`pt` or `safetensors`."""
    tensors: dict[str, np.ndarray]
    """By name, those of nested dicts with dots between; views of the mapped file."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Numbers and texts that lie beside the tensors."""

    def summary(self) -> dict[str, Any]:
        """Sizes in numbers, as JSON values."""
        return {
            "tensor_count": len(self.tensors),
            "value_count": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            "dtypes": dict(Counter(str(tensor.dtype) for tensor in self.tensors.values()).most_common()),
        }


def the_file(place: Path) -> Path | None:
    """The file to look at: `place` itself, or the only one of tensors in a folder; None where there is none.

    Raises:
        InputError: a folder with several.
    """
    if place.is_file():
        return place
    found = sorted(path for path in place.iterdir() if path.suffix in _SUFFIXES) if place.is_dir() else []
    if len(found) > 1:
        raise InputError(f"{place} has {len(found)} files ({first([path.name for path in found])}); give one of them")
    return found[0] if found else None


def is_gguf(path: Path) -> bool:
    """By its name, or where that says nothing by its first bytes."""
    return path.suffix == ".gguf" or (path.suffix not in _SUFFIXES and _begin(path) == gguf_header.MAGIC)


def read(path: Path, *, every_value: bool) -> TensorFile:
    """A file of torch.save or of safetensors, told by its name, or where that says nothing by its first bytes.

    Args:
        path: the file.
        every_value: compare values with their checksums, where the format has any.

    Raises:
        InputError: neither, damaged or hostile.
    """
    if path.suffix == ".safetensors":
        return TensorFile("safetensors", safetensors_file.read(path), safetensors_file.metadata(path))
    if path.suffix not in _PT and _begin(path) != b"PK\x03\x04":
        raise InputError(f"{path} is no file of tensors; give {', '.join(_SUFFIXES)} or a model folder")
    content = pt_file.read(path, every_value=every_value)
    leaves = list(_leaves(content, "", 0))
    tensors = {name: value for name, value in leaves if isinstance(value, np.ndarray)}
    settings = [(name, value) for name, value in leaves if not isinstance(value, np.ndarray)]
    kept = dict(settings[:_SETTINGS])
    if len(settings) > len(kept):
        kept["…"] = f"{len(settings) - len(kept):,} more"
    return TensorFile("pt", tensors, kept)


def _begin(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers, texts and short lists of them in nested dicts, by their path."""
    if isinstance(value, Mapping) and depth < _DEPTH:
        for key, inner in value.items():
            if isinstance(key, str | int):
                yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, np.ndarray) and (value.ndim or depth != 1):
        yield name or "tensor", value
    elif isinstance(value, np.ndarray):  # a number beside the parameters, such as the best loss
        yield name, float(value)
    elif isinstance(value, str):
        yield name, value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
    elif isinstance(value, bool | int | float | None):
        yield name, value
    elif isinstance(value, list | tuple) and len(value) <= 16 and all(isinstance(v, bool | int | float) for v in value):
        yield name, list(value)
