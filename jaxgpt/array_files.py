"""What a folder of arrays declares, bounded before Orbax is given it.

Orbax follows an absolute path in its `_METADATA`, and a shape that no memory holds
aborts the process. A manifest does not help where its author is hostile. Arrays are
therefore stored in the plainest of Orbax's forms (Zarr 3, one folder an array,
uncompressed), whose every declaration can be checked against the bytes on disk.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError, first

if TYPE_CHECKING:
    import numpy as np

TREE = "_METADATA"
"""Orbax's list of array names."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names that are one folder each, below the one they are in."""
ITEM_BYTES = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
_INDEX = struct.Struct("<QQ")
"""Offset and bytes of a shard's one chunk."""
_ALIGNMENT = 64
"""Of memory that XLA takes as it is on a CPU (`kMinAlign`)."""
_CHUNK = re.compile(r"c(/\d+)*")
_ZARR_KEYS = {
    "chunk_grid", "chunk_key_encoding", "codecs", "data_type", "fill_value", "node_type", "shape", "zarr_format",
    "attributes", "dimension_names",
}  # fmt: skip
_CODECS = {"sharding_indexed", "bytes", "crc32c"}
"""Codecs without compression: what is declared must be there in bytes."""


@dataclass(frozen=True)
class Header:
    """Shape and dtype of an array on disk."""

    shape: tuple[int, ...]
    dtype: str
    """A key of ITEM_BYTES."""

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def headers(folder: Path, sizes: Mapping[str, int]) -> dict[str, Header]:
    """Shape and dtype of every array in the folder, none of them read.

    Args:
        folder: one tree as Orbax wrote it.
        sizes: bytes of every file in it, by relative name.

    Raises:
        InputError: a name that is a path, a file nobody declared, or a declaration
            that the bytes on disk do not bear out.
    """
    names = _array_names(folder)
    stored = dict.fromkeys(names, 0)
    for file, size in sizes.items():
        name, _, rest = file.partition("/")
        if name in stored and _CHUNK.fullmatch(rest):
            stored[name] += size
        elif file != TREE and not (name in stored and rest == "zarr.json"):
            raise InputError(f"{folder.name}/{file} belongs to no array of the checkpoint; refused")
    return {name: _header(folder / name / "zarr.json", bytes_) for name, bytes_ in stored.items()}


def mapped(folder: Path, header: Header) -> "np.ndarray | None":
    """An array of `headers` as its file lies on disk, read-only and read when used; None where it is in pieces.

    Args:
        folder: of the array, with its zarr.json.
        header: what `headers` found there.
    """
    import numpy as np

    path = _only_file(folder, header)
    return None if path is None else np.memmap(path, _dtype(header), "r", shape=header.shape)


def read(folder: Path, header: Header) -> "np.ndarray | None":
    """As `mapped`, in memory that JAX takes as it is on a CPU, without another copy."""
    import numpy as np

    path = _only_file(folder, header)
    if path is None:
        return None
    memory = np.empty(header.size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    found = memory[start : start + header.size]
    with path.open("rb", buffering=0) as file:
        filled = 0
        while filled < header.size and (count := file.readinto(found.data[filled:])):
            filled += count
    if filled < header.size:
        raise InputError(f"params/{folder.name} ends after {filled:,} of {header.size:,} bytes")
    # Whoever changed it would change a model that runs.
    memory.flags.writeable = found.flags.writeable = False
    return found.view(_dtype(header)).reshape(header.shape)


def _only_file(folder: Path, header: Header) -> Path | None:
    """The file of an array that is in one piece, from whose beginning it lies there."""
    path = folder.joinpath("c", *("0" for _ in header.shape))
    size = path.stat().st_size if path.is_file() else 0
    # A shard of one chunk: its bytes, then where they begin, how many they are, and a checksum of these two.
    index = _INDEX.size + 4
    if not header.shape or size != header.size + index or not _in_one_piece(folder / "zarr.json", header):
        return None
    with path.open("rb") as file:
        file.seek(header.size)
        return path if file.read(_INDEX.size) == _INDEX.pack(0, header.size) else None


def _dtype(header: Header) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if header.dtype == "bfloat16" else header.dtype


def _in_one_piece(path: Path, header: Header) -> bool:
    """The zarr.json, which `headers` checked, declares one shard of one chunk of plain little-endian bytes."""
    zarr = _json(path, path.name)
    whole, plain = list(header.shape), [{"name": "bytes", "configuration": {"endian": "little"}}]
    [codec] = zarr["codecs"] if len(zarr["codecs"]) == 1 else [{}]
    inner = codec.get("configuration", {})
    one_shard = zarr["chunk_grid"]["configuration"]["chunk_shape"] == whole == inner.get("chunk_shape")
    named = inner.get("index_location", "end") == "end" and codec.get("name") == "sharding_indexed"
    default_key = zarr.get("chunk_key_encoding") == {"name": "default"}
    filled = zarr.get("fill_value", 0) == 0
    return one_shard and named and default_key and filled and inner.get("codecs") == plain


def _array_names(folder: Path) -> list[str]:
    where = f"{folder.name}/{TREE}"
    tree = _json(folder / TREE, where)
    entries = tree.get("tree_metadata")
    if tree.get("use_ocdbt") is not False or tree.get("use_zarr3") is not True or not isinstance(entries, dict):
        raise InputError(f"{where} declares another storage than jaxgpt writes; refused")
    names: list[str] = []
    for entry in entries.values():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        if not isinstance(keys, list) or len(keys) != 1 or not isinstance(keys[0], dict):
            raise InputError(f"{where} does not declare one flat dictionary; refused")
        names.append(str(keys[0].get("key")))
    bad = [name for name in names if not NAME.fullmatch(name)]
    if bad or len(set(names)) != len(names):
        raise InputError(f"{where} names {first(bad or names)}, which is no array of this folder; refused")
    expected = {str((name,)) for name in names}
    if entries.keys() != expected:
        raise InputError(f"{where} gives arrays two names; refused")
    return names


def _header(path: Path, stored: int) -> Header:
    where = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    zarr = _json(path, where)
    shape, dtype = _shape(zarr.get("shape")), zarr.get("data_type")
    is_array = zarr.get("zarr_format") == 3 and zarr.get("node_type") == "array" and zarr.keys() <= _ZARR_KEYS
    if not is_array or shape is None or not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"{where} does not declare an array that jaxgpt writes; refused")
    header = Header(shape, dtype)
    if header.size > stored:
        raise InputError(f"{where} declares {in_bytes(header.size)}, its files hold {in_bytes(stored)}; refused")
    grid = zarr.get("chunk_grid")
    if not isinstance(grid, dict) or not _chunks_fit(grid.get("configuration"), shape):
        raise InputError(f"{where} declares chunks larger than the array; refused")
    if not _plain(zarr.get("codecs"), shape):
        raise InputError(f"{where} declares codecs that jaxgpt does not write; refused")
    return header


def _shape(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(type(n) is not int or n < 1 for n in value):
        return None
    return tuple(value)


def _chunks_fit(configuration: object, shape: tuple[int, ...]) -> bool:
    chunk = _shape(configuration.get("chunk_shape")) if isinstance(configuration, dict) else None
    return chunk is not None and len(chunk) == len(shape) and all(c <= n for c, n in zip(chunk, shape, strict=True))


def _plain(codecs: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(codecs, list):
        return False
    for codec in codecs:
        if not isinstance(codec, dict) or codec.get("name") not in _CODECS:
            return False
        if codec["name"] == "sharding_indexed":
            inner = codec.get("configuration")
            if not isinstance(inner, dict) or not _chunks_fit(inner, shape):
                return False
            if not _plain(inner.get("codecs"), shape) or not _plain(inner.get("index_codecs"), shape):
                return False
    return True


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{where} is not readable JSON; refused") from None
    if not isinstance(content, dict):
        raise InputError(f"{where} is not a JSON object; refused")
    return content


def in_bytes(size: int) -> str:
    """`1.4 GB`, `8.0 TB`: a number of bytes for people."""
    value = float(size)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
