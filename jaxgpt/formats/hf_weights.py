"""The weights of a Hugging Face folder, by name: safetensors, or what torch.save wrote; in one file or in shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxgpt.errors import InputError, first
from jaxgpt.formats import json_file, pt_file, safetensors_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PT_WEIGHTS, PT_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ORDER = (WEIGHTS, INDEX, PT_WEIGHTS, PT_INDEX)
"""Which is read where there are several: as transformers decides."""


def read(folder: Path, *, every_value: bool = True) -> tuple[str, dict[str, np.ndarray]]:
    """The file that messages name, and every tensor as a view of the mapped files, in the dtype of its header.

    Args:
        folder: of a model.
        every_value: compare what torch.save wrote with its checksums, which reads all of it.

    Raises:
        InputError: no weights, a damaged or hostile file, or an index that its shards do not bear out.
    """
    source = next((name for name in _ORDER if (folder / name).exists()), None)
    if source is None:
        raise InputError(f"{folder} has no weights: none of {', '.join(_ORDER)}")
    shards = {source: None} if source in (WEIGHTS, PT_WEIGHTS) else _shards(folder / source)
    tensors: dict[str, np.ndarray] = {}
    for file, expected in shards.items():
        is_torch = source in (PT_WEIGHTS, PT_INDEX)
        found = _of_torch(folder / file, every_value) if is_torch else safetensors_file.read(folder / file)
        if expected is not None and expected != found.keys():
            wrong = sorted(expected ^ found.keys())
            raise InputError(f"{source} and {file} disagree on {len(wrong)} tensors (first: {first(wrong)})")
        tensors |= found
    return source, tensors


def _of_torch(path: Path, every_value: bool) -> dict[str, np.ndarray]:
    """A file of torch.save that holds tensors by name and nothing else."""
    content = pt_file.read(path, every_value=every_value)
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds a {type(content).__name__}; expected a dict of tensors")
    others = list(_others(content))
    if others or not content:
        what = f"other things than tensors by name (first: {first(others)})" if others else "no tensors"
        raise InputError(f"{path.name} holds {what}; a training script's file is imported by itself: give its path")
    pt_file.refuse_repeated(path, content)
    return dict(content)


def _others(content: dict[object, object]) -> Iterator[str]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            yield f"{name if isinstance(name, str) else type(name).__name__}: {type(value).__name__}"


def _shards(index: Path) -> dict[str, set[str]]:
    """Tensor names by shard, from the index."""
    weight_map = json_file.read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index.name} has no weight_map from tensors to files")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or "\\" in file or not file.isprintable() or file in (".", "..", ""):
            raise InputError(f"index names {first([file])}, outside the model directory; refused")
        shards.setdefault(file, set()).add(name)
    return shards
