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

import ml_dtypes
import numpy as np

from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened
from jaxgpt.formats import json_file

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes a model's parameters may have, as the file and as numpy names them."""
_ALL: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
        "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
        "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
    }.items()
}  # fmt: skip
_LARGEST_HEADER = 4 << 20
"""Room for thirty thousand tensors; read as JSON, it takes some twenty times as much memory."""
_DIMENSIONS, _VALUES = 8, 2**48
"""Of one tensor; below both, no product of sizes takes long or overflows."""
Header = dict[str, dict[str, Any]]
"""By tensor name: `dtype`, `shape`, `data_offsets` (from, to) after the header."""


def read_header(path: Path) -> tuple[Header, int]:
    """The header, and where the tensors' bytes begin.

    Raises:
        InputError: unreadable, or a declaration that the file's size does not bear out.
    """
    header, begin, size = _json(path)
    header.pop("__metadata__", None)
    _check_offsets(path.name, header, size - begin)
    return header, begin


def metadata(path: Path) -> dict[str, str]:
    """The texts that a file carries beside its tensors.

    Raises:
        InputError: unreadable, or no object of texts.
    """
    found = _json(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path.name}: its __metadata__ is not an object of texts; refused")
    return found


def _json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands there, where the tensors' bytes begin, and the file's size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is a folder, pipe or device, not a file; give a folder of model files")
        size = status.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise InputError(f"{path.name}: header declares {_short(length)}, file is {_short(size)}; refused")
            header = json.loads(file.read(length), object_pairs_hook=json_file.unique("safetensors header"))
    except OSError as error:
        raise InputError(f"{path!s:.200} cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path.name} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path.name} is no safetensors file: its header is not a JSON object")
    return header, 8 + length, size


def _check_offsets(file: str, header: Header, available: int) -> None:
    end = 0
    for name, start, stop in sorted(((n, *_offsets(file, n, e)) for n, e in header.items()), key=lambda item: item[1:]):
        if start != end:
            raise InputError(f"{file}: tensor {first([name])} does not begin where the one before ends; refused")
        end = stop
    if end != available:
        declared, held = _short(end), _short(available)
        if declared == held:  # cut short, or made longer, by little
            declared, held = f"{end:,} bytes", f"{available:,} bytes behind it"
        raise InputError(f"{file}: header declares {declared}, file is {held}; refused")


def _offsets(file: str, name: str, entry: Any) -> tuple[int, int]:
    try:
        start, stop = entry["data_offsets"]
        shape, itemsize = entry["shape"], _ALL[entry["dtype"]].itemsize
        whole = all(type(n) is int and n >= 0 for n in (start, stop, *shape))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file}: tensor {first([name])} is not described as safetensors does; refused") from None
    # Empty tensors too have sizes that numpy multiplies.
    small = whole and len(shape) <= _DIMENSIONS and math.prod(n or 1 for n in shape) < _VALUES
    if not small or stop - start != math.prod(shape) * itemsize:
        where = f"its bytes {start}–{stop}" if whole else "its bytes"
        raise InputError(
            f"{file}: tensor {first([name])} of shape {shortened(shape)} does not fill {where:.80}; refused"
        )
    return start, stop


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by name, as a read-only view of the mapped file in the dtype of its header.

    Raises:
        InputError: as `read_header`.
    """
    header, begin = read_header(path)
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    found: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        found[name] = mapped[begin + start : begin + stop].view(_ALL[entry["dtype"]]).reshape(entry["shape"])
    return found


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
