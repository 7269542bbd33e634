"""One .safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes.

Read here rather than through the safetensors package, whose numpy interface has no
bfloat16: the header is checked against the file's size, then tensors are views of
the mapped file. The format is that of safetensors' own documentation.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import InputError

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes a model's parameters may have, as the file and as numpy names them."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LARGEST_HEADER = 16 << 20
"""Room for a hundred thousand tensors; read as JSON, it takes some twenty times as much memory."""
Header = dict[str, dict[str, Any]]
"""By tensor name: `dtype`, `shape`, `data_offsets` (from, to) after the header."""


def read_header(path: Path) -> tuple[Header, int]:
    """The header, and where the tensors' bytes begin.

    Raises:
        InputError: unreadable, or a declaration that the file's size does not bear out.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is a folder, pipe or device, not a file; give a folder of model files")
        size = status.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise InputError(f"{path.name}: header declares {_short(length)}, file is {_short(size)}; refused")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise InputError(f"{path!s:.200} cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path.name} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path.name} is no safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    _check_offsets(path.name, header, size - 8 - length)
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise InputError("safetensors header names a tensor twice; refused")
    return dict(pairs)


def _check_offsets(file: str, header: Header, available: int) -> None:
    end = 0
    for name, start, stop in sorted(((n, *_offsets(file, n, e)) for n, e in header.items()), key=lambda item: item[1:]):
        if start != end:
            raise InputError(f"{file}: tensor {name} does not begin where the one before ends; refused")
        end = stop
    if end != available:
        declared, held = _short(end), _short(available)
        if declared == held:  # cut short, or made longer, by little
            declared, held = f"{end:,} bytes", f"{available:,} bytes behind it"
        raise InputError(f"{file}: header declares {declared}, file is {held}; refused")


def _offsets(file: str, name: str, entry: Any) -> tuple[int, int]:
    try:
        start, stop = entry["data_offsets"]
        shape, bits = entry["shape"], _BITS[entry["dtype"]]
        whole = all(type(n) is int and n >= 0 for n in (start, stop, *shape))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file}: tensor {name} is not described as safetensors does; refused") from None
    if not whole or stop - start != math.prod(shape) * bits // 8:
        raise InputError(f"{file}: tensor {name} of shape {shape} does not fill its bytes {start}–{stop}; refused")
    return start, stop


def read_tensor(path: Path, entry: Mapping[str, Any], begin: int) -> np.ndarray:
    """One tensor of a checked header, as a read-only view of the file."""
    import jax.numpy as jnp

    dtype, shape = jnp.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    start = begin + entry["data_offsets"][0]
    return (
        np.memmap(path, np.uint8, "r", start, entry["data_offsets"][1] - entry["data_offsets"][0])
        .view(dtype)
        .reshape(shape)
    )


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file with metadata `{"format": "pt"}`, which transformers asks for; bytes are little-endian."""
    names = {numpy: ours for ours, numpy in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _short(size: int) -> str:
    """`8 TiB`, `1 KB`: a number of bytes in short."""
    for unit, bytes_ in (("TiB", 2**40), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}"
    return f"{size} bytes"
