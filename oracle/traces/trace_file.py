"""A trace as one safetensors file: tensors, and one JSON text in the header's metadata.

There is no pickle in it, so that a trace from anywhere is safe to open; nothing of
the file is believed before it has been checked against the file's size. Tensors are
mapped: a trace larger than memory can be compared.
"""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt.errors import InputError
from jaxgpt.formats import safetensors_file
from oracle import output_file
from oracle.traces.trace import Trace

VERSION = 1
"""Of the metadata."""
_KEY = "oracle_trace"
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_STORABLE = {np.dtype(dtype) for dtype in _DTYPES.values()}


def save(trace: Trace, path: Path | str) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        InputError: a dtype that the format lacks, or a place that cannot be written.
    """
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    for kind, group in (("taps", trace.taps), ("inputs", trace.inputs)):
        for name, array in group.items():
            if array.dtype.newbyteorder("=") not in _STORABLE:
                raise InputError(f"{name} is {array.dtype}, which a trace cannot hold; convert or exclude it")
            tensors[f"{kind}/{name}"] = np.asarray(array, order="C")
    try:
        with output_file.whole(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial, metadata={_KEY: json.dumps(_description(trace))})
            partial.chmod(mode)  # safetensors leaves a file that its owner alone may read
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {_first_line(error)}") from None


def _description(trace: Trace) -> dict[str, Any]:
    return {
        "version": VERSION,
        "taps": list(trace.taps),
        "inputs": list(trace.inputs),
        "environment": dict(trace.environment),
        "left_out": dict(trace.left_out),
    }


def load(path: Path | str) -> Trace:
    """The trace of a file, its arrays read-only views of the mapped file.

    Raises:
        InputError: no trace, a damaged one, or one of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file; give a trace written by `python -m oracle record`")
    _refuse_no_trace(path)
    header, begin = safetensors_file.read_header(path)
    described = _read_description(path)
    names = {kind: _names(path, described, kind) for kind in ("taps", "inputs")}
    expected = {f"{kind}/{name}" for kind, group in names.items() for name in group}
    if expected != header.keys():
        different = sorted(expected ^ header.keys())[0]
        raise InputError(f"{path.name}: its list of taps and its tensors disagree about {different!r}; record it again")
    # One mapping for all: each would hold a file descriptor.
    data = np.memmap(path, np.uint8, "r")[begin:]
    arrays = {kind: {n: _array(path, n, data, header[f"{kind}/{n}"]) for n in group} for kind, group in names.items()}
    texts = [_texts(path, described, key) for key in ("environment", "left_out")]
    return Trace(arrays["taps"], arrays["inputs"], *texts)


def _refuse_no_trace(path: Path) -> None:
    """A text or picture is no damaged trace: after a length every trace begins with a brace."""
    try:
        with path.open("rb") as file:
            begins = file.read(9)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a trace that may be read") from None
    if len(begins) == 9 and begins[8:] != b"{":
        raise InputError(f"{path.name} is no trace; give a file written by `python -m oracle record`")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_KEY)
        described = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is damaged: {_first_line(error)}") from None
    if not isinstance(described, dict):
        raise InputError(f"{path.name} holds tensors but no trace; write one with `python -m oracle record`")
    version = described.get("version")
    if type(version) is not int or version != VERSION:
        shown = reprlib.repr(version) if type(version) is int else "unknown"
        raise InputError(f"{path.name} has trace version {shown}, this oracle reads {VERSION}; record it again")
    return described


def _names(path: Path, described: Mapping[str, Any], key: str) -> list[str]:
    names = described.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path.name}: its list of {key} is no list of names; record it again")
    if len(set(names)) != len(names):
        raise InputError(f"{path.name}: its list of {key} holds a name twice; record it again")
    return names


def _texts(path: Path, described: Mapping[str, Any], key: str) -> dict[str, str]:
    texts = described.get(key)
    sound = isinstance(texts, dict) and all(isinstance(value, str) and value.isprintable() for value in texts.values())
    if not isinstance(texts, dict) or not sound or not all(name.isprintable() for name in texts):
        raise InputError(f"{path.name}: its {key} is not a table of texts; record it again")
    return texts


def _array(path: Path, name: str, data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{path.name}: {name} is {entry['dtype']}; a trace holds {', '.join(_DTYPES)}; record it again"
        )
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    return data[start:stop].view(dtype).reshape(shape) if math.prod(shape) else np.zeros(shape, dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
