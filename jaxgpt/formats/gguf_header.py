"""What a GGUF file declares: metadata and tensors, every length checked before it is believed.

Read here rather than by the gguf package, whose reader loops as often as the file
says and makes an array of every string. The layout is that of ggml's `docs/gguf.md`.
"""

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgpt.array_files import in_bytes
from jaxgpt.errors import InputError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LONGEST_NAME, _LONGEST_TEXT = 65535, 65536
"""Bytes of a name, and of a text that is kept."""
_MOST_ENTRIES, _MOST_STRINGS = 100_000, 2_000_000
"""Ten times what any model has, and read in a second."""
_SHOWN = 8
"""Items of an array that are kept."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of a value, by number, as `struct` names them."""
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Array:
    """A list in the metadata: how long it is and how it begins."""

    length: int
    first: list[Any]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and as what."""

    name: str
    shape: tuple[int, ...]
    """In numpy's order: the file's own is the reverse."""
    dtype: str
    """ggml's name: F32, F16, BF16, Q8_0, Q4_K, …"""
    start: int
    """Of its bytes, from the beginning of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """Everything before the tensors' bytes."""

    version: int
    metadata: dict[str, Any]
    """Numbers, booleans, texts (the first 64 KiB) and `Array`."""
    tensors: list[TensorEntry]


def require_package() -> None:
    """Raise InputError where the gguf package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF needs the package gguf; run `pip install 'jaxgpt[gguf]'`")


def read(path: Path) -> Header:
    """The header of a GGUF file; no tensor is read.

    Raises:
        InputError: no gguf package, unreadable, or a declaration that the file's size does not bear out.
        OSError: the file cannot be opened.
    """
    require_package()
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise InputError(f"{path.name} is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path.name, data).header()


def views(path: Path, header: Header) -> dict[str, np.ndarray]:
    """Tensors that are not quantised, as read-only views of the mapped file."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    return {
        t.name: mapped[t.start : t.start + t.size].view(dtypes[t.dtype]).reshape(t.shape)
        for t in header.tensors
        if t.dtype in dtypes
    }


class _Reader:
    """A place in the file, that moves on with every value."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self._file, self._data, self._at, self._size = name, data, 4, len(data)
        self._strings = 0

    def header(self) -> Header:
        version = self._value("I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise self._refused("is big-endian" if big else f"has GGUF version {version}, expected 2 or 3")
        tensors, entries = self._count("Q", 24, "tensors"), self._count("Q", 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._name()
            if key in metadata:
                raise self._refused(f"has metadata {_short(key)} twice")
            metadata[key] = self._typed(self._value("I"))
        declared = [self._declaration() for _ in range(tensors)]
        return Header(version, metadata, self._placed(declared, metadata.get("general.alignment", 32)))

    def _value(self, kind: str) -> Any:
        size = struct.calcsize(kind)
        self._require(size)
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += size
        return value

    def _count(self, kind: str, smallest: int, what: str) -> int:
        """A number of things of at least `smallest` bytes each."""
        count = self._value(kind)
        if count > _MOST_ENTRIES or count * smallest > self._size - self._at:
            raise self._refused(f"declares {count:,} {what}, file is {in_bytes(self._size)}")
        return count

    def _require(self, size: int) -> None:
        if size > self._size - self._at:
            raise self._refused(f"declares {in_bytes(size)} at byte {self._at:,}, file is {in_bytes(self._size)}")

    def _bytes(self, keep: int) -> bytes:
        """A string's first bytes; the place moves behind all of it."""
        length = self._value("Q")
        self._require(length)
        found = self._data[self._at : self._at + min(length, keep)]
        self._at += length
        return found

    def _name(self) -> str:
        name = self._bytes(_LONGEST_NAME + 1)
        if not name or len(name) > _LONGEST_NAME:
            raise self._refused(f"has a name of {len(name):,} bytes")
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise self._refused(f"has the name {_short(repr(name))}, which is not UTF-8") from None

    def _typed(self, kind: int) -> Any:
        if kind == _STRING:
            return self._bytes(_LONGEST_TEXT).decode(errors="replace")
        if kind == _ARRAY:
            return self._array(self._value("I"), self._value("Q"))
        if kind in _SCALARS:
            return self._value(_SCALARS[kind])
        raise self._refused(f"has a value of type {kind}, expected 0–12")

    def _array(self, kind: int, length: int) -> Array:
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self._require(length * size)
            begin = self._at
            shown = [self._value(_SCALARS[kind]) for _ in range(min(length, _SHOWN))]
            self._at = begin + length * size
            return Array(length, shown)
        if kind != _STRING:
            raise self._refused(f"has a list of values of type {kind}, which llama.cpp does not read")
        self._strings += length
        if length * 8 > self._size - self._at or self._strings > _MOST_STRINGS:
            raise self._refused(f"declares {length:,} texts, file is {in_bytes(self._size)}")
        shown = [self._bytes(200).decode(errors="replace") for _ in range(min(length, _SHOWN))]
        self._skip(length - len(shown))
        return Array(length, shown)

    def _skip(self, strings: int) -> None:
        """Move behind so many strings: all but a few of a vocabulary."""
        at, last, data, read = self._at, self._size - 8, self._data, _LENGTH.unpack_from
        for _ in range(strings):
            if at > last:
                break
            at += 8 + read(data, at)[0]
        else:
            if at <= self._size:
                self._at = at
                return
        raise self._refused(f"has a list of texts that ends at byte {at:,}, file is {in_bytes(self._size)}")

    # -- Tensors -----------------------------------------------------------------------

    def _declaration(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._name(), self._value("I")
        if not 1 <= dimensions <= 4:
            raise self._refused(f"gives {_short(name)} {dimensions:,} dimensions, expected 1–4")
        shape = tuple(self._value("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._value("I"), self._value("Q")

    def _placed(self, declared: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> list[TensorEntry]:
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._refused(f"has general.alignment {_short(str(alignment))}, expected a power of two")
        begin = -(-self._at // alignment) * alignment
        found: dict[str, TensorEntry] = {}
        end = begin
        for name, shape, kind, offset in declared:
            dtype, size = self._size_of(name, shape, kind)
            if name in found:
                raise self._refused(f"has tensor {_short(name)} twice")
            if begin + offset != end:
                raise self._refused(f"places tensor {_short(name)} elsewhere than where the one before ends")
            if offset + begin + size > self._size:
                raise self._refused(f"gives {_short(name)} {in_bytes(size)}, file is {in_bytes(self._size)}")
            found[name] = TensorEntry(name, shape, dtype, end, size)
            end = begin + -(-(offset + size) // alignment) * alignment
        return list(found.values())

    def _size_of(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            dtype = GGMLQuantizationType(kind)
        except ValueError:
            raise self._refused(f"gives {_short(name)} the unknown type {kind}") from None
        block, size = GGML_QUANT_SIZES[dtype]
        if shape[-1] % block:
            raise self._refused(f"gives {_short(name)} rows of {shape[-1]:,}, {dtype.name} has blocks of {block}")
        return dtype.name, math.prod(shape) // block * size

    def _refused(self, problem: str) -> InputError:
        return InputError(f"{self._file} {problem}; refused")


def _short(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:60]}…"
