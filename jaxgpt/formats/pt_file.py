"""Files of `torch.save`, read without torch: the zip container, its pickle, and the tensors' bytes.

A pickle is a program. This one may only build lists, dicts, numbers, strings and
tensors: its opcodes are read before it runs, every name that it imports is one of
`_NAMES`, and none of them is code that the file brings along.
Source: torch/csrc/jit/serialization (container), torch/_weights_only_unpickler.py (names).
"""

import io
import itertools
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened

_PICKLE_BYTES, _OPCODES, _ENTRIES, _DIMENSIONS = 4 << 20, 500_000, 100_000, 8
"""Largest pickle, its opcodes, files in the zip, and sizes of a tensor: above any model's, so that bombs are small."""
_SET = 16
"""Values of a set in settings."""
_TUPLE = 1000
"""Values in a tuple, those of the tuples in it counted: one of torch.save has some ten."""

_STORAGES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "FloatStorage": np.float32,
        "DoubleStorage": np.float64,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }.items()
}

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""Names of torch's dtypes, which settings may hold."""

# fmt: off
_ALLOWED_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
))
# fmt: on
"""What torch.save writes for plain values; a class is only ever one of `_NAMES`."""


class _Sealed:
    """What a pickle may hold but not change: `BUILD` sets the attributes of anything that has no `__setstate__`."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise ValueError(f"state set on {type(self).__name__}")


class _Storage(_Sealed):
    """The bytes of one entry of the zip, as numbers: (numel,)."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _Function(_Sealed):
    """What a name of the pickle stands for."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        return self._run(*arguments)


def read(path: str | Path, *, every_value: bool = True) -> Any:
    """What was saved, with numpy arrays (views of the mapped file) for tensors.

    Args:
        path: the file.
        every_value: compare the tensors' bytes with their checksums, which reads all of them.

    Raises:
        InputError: the file is damaged, older than torch 1.6's zip format, too deep or
            large to be a model, or needs code of its own to load.
    """
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # a hostile directory may also raise ValueError, struct.error, NotImplementedError, …
        raise InputError(_not_a_zip(path)) from None
    with archive:
        return _read_archive(path, archive, every_value)


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(16)
    if begin[:1] == b"\x80" or b"ustar" in begin:
        return (
            f"{path} is in the format of torch before 1.6, which is not read; convert it where torch is installed: "
            f"python -c \"import torch; torch.save(torch.load('{path}', weights_only=True), 'new.pt')\""
        )
    return f"{path} is not a file of torch.save, or cut short"


def _read_archive(path: Path, archive: zipfile.ZipFile, every_value: bool) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) > _ENTRIES:
        raise InputError(f"{path} has {len(entries):,} entries; a model has fewer than {_ENTRIES:,}")
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
    if len(pickles) != 1:
        raise InputError(f"{path} is a zip file with {len(pickles)} data.pkl; torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    _refuse_overlaps(path, archive.infolist(), len(mapped))
    order = entries.get(f"{folder}byteorder")
    if order is not None and bytes(_stored(path, mapped, order, _PICKLE_BYTES)).strip() != b"little":
        raise InputError(f"{path} holds big-endian numbers; save it again on a little-endian machine")
    program = bytes(_stored(path, mapped, entries[pickles[0]], _PICKLE_BYTES))
    _refuse_foreign_opcodes(path, program)
    read: dict[str, np.ndarray] = {}

    def storage(key: object) -> np.ndarray:
        name = f"{folder}data/{key}" if isinstance(key, str) else ""
        if name not in entries:
            raise InputError(f"{path} lacks data/{first([str(key)])}, which a tensor needs; copy the file again")
        if name not in read:  # once, however many tensors share it
            read[name] = _stored(path, mapped, entries[name], checked=every_value)
        return read[name]

    return _run(path, program, storage)


def _refuse_overlaps(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Entries of the same bytes would be read as often as they are listed."""
    declared = sum(info.compress_size for info in entries)
    if declared > size:
        raise InputError(f"{path} lists {declared:,} bytes of entries, file is {size:,}; copy the file again")


def _stored(
    path: Path, mapped: np.ndarray, info: zipfile.ZipInfo, limit: int | None = None, *, checked: bool = True
) -> np.ndarray:
    """The bytes of an entry, as a view of the mapped file: torch never compresses."""
    name = first([info.filename])
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise InputError(f"{path}: {name} is compressed, which torch.save never does; refused")
    if limit is not None and info.file_size > limit:
        raise InputError(f"{path}: {name} has {info.file_size:,} bytes; a model's has at most {limit:,}")
    # Its lengths stand in the local header, which may differ from the directory's.
    header = bytes(mapped[info.header_offset : info.header_offset + 30])
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise InputError(f"{path}: {name} has no header where the directory says; copy the file again")
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if begin + info.file_size > len(mapped):
        raise InputError(f"{path}: {name} ends after the file does; copy it again")
    content = mapped[begin : begin + info.file_size]
    if checked and zlib.crc32(content.data) != info.CRC:
        raise InputError(f"{path}: {name} fails its CRC-32; copy the file again")
    return content


def refuse_repeated(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise InputError where tensors share bytes so often that they are far larger than their file.

    A tied head repeats the embedding; nothing repeats all of the model.
    """
    total, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if total > 2 * size:
        raise InputError(f"{path.name} has tensors of {total:,} bytes in a file of {size:,}; refused")


def _refuse_foreign_opcodes(path: Path, program: bytes) -> None:
    """Raise unless the pickle is short, and of opcodes that torch.save writes for plain values.

    The memo index is checked too: the unpickler makes room up to the index it is given.
    And so are tuples of tuples: hashed as a key, one takes as long as it would be written out.
    """
    opcodes, tuples = pickletools.genops(program), _Tuples()
    for count in itertools.count(1):
        try:
            opcode, argument, _ = next(opcodes)
            values = tuples.step(opcode, argument) if opcode.name in _ALLOWED_OPCODES else 0
        except StopIteration:
            return
        except (ValueError, IndexError, struct.error):
            raise InputError(f"{path} has a damaged pickle; copy the file again") from None
        if opcode.name not in _ALLOWED_OPCODES:
            raise InputError(f"{path} needs arbitrary code to load (pickle opcode {opcode.name}); refused")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise InputError(f"{path} is no file of torch.save: its pickle skips memo entries; refused")
        if values > _TUPLE:
            raise InputError(f"{path} is no file of torch.save: its pickle nests tuples without end; refused")
        if count > _OPCODES:
            raise InputError(f"{path} has a pickle of more than {_OPCODES:,} steps; a model's has fewer")


class _Tuples:
    """How many values the tuples of a pickle have when written out, found without running it."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Follow one opcode; the values of what it puts on the stack.

        Raises:
            ValueError: more is taken than was put there.
        """
        if opcode.name == "MARK":
            self._marks.append(len(self._stack))
            return 0
        if opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if opcode.name == "MEMOIZE" else argument] = self._stack[-1]
            return 0
        if opcode.name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo.get(argument, 1))
            return 0
        taken = self._taken(opcode)
        if opcode.stack_after:
            self._stack.append(1 + sum(taken) if opcode.name.startswith("TUPLE") else 1)
            return self._stack[-1]
        return 0

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        before = opcode.stack_before
        count = len(before)
        if pickletools.markobject in before:
            count = len(self._stack) - self._marks.pop() + before.index(pickletools.markobject)
        if count > len(self._stack):
            raise ValueError("more is taken from the stack than is there")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken


# -- What the pickle may import --------------------------------------------------------


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage; what else torch notes (hooks, gradients) is not read."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor of something else than a storage, sizes and strides")
    begin, *lengths = _sizes((offset, *size, *stride))
    lengths, steps = lengths[: len(size)], lengths[len(size) :]
    if len(lengths) != len(steps) or len(lengths) > _DIMENSIONS:
        raise ValueError(f"a tensor of {len(lengths)} sizes and {len(steps)} strides")
    values, count = storage.values, math.prod(lengths)
    last = begin + sum((n - 1) * step for n, step in zip(lengths, steps, strict=True)) if count else -1
    if count > len(values) or last >= len(values):
        raise ValueError(f"a tensor of size {lengths} in a storage of {len(values):,} numbers")
    bytes_of = [step * values.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(values[begin:], lengths, bytes_of, writeable=False)


def _sizes(numbers: tuple[object, ...]) -> list[int]:
    sizes = [n for n in numbers if type(n) is int and n >= 0]
    if len(sizes) < len(numbers):
        raise ValueError(f"a tensor of offset, size and stride {shortened(numbers)}")
    return sizes


class _Dict(OrderedDict[Any, Any]):
    """A dict whose methods no pickle hides: `BUILD` would set attributes of those names."""

    def __setstate__(self, state: object) -> None:
        """`_metadata` of a state_dict, which numbers versions of modules, is not kept."""


def _size(numbers: object) -> tuple[int, ...]:
    """`torch.Size`, of which torch makes a list in settings as well."""
    if not isinstance(numbers, list | tuple) or len(numbers) > _DIMENSIONS:
        raise ValueError("a torch.Size of something else than a few numbers")
    return tuple(_sizes(tuple(numbers)))


def _parameter(tensor: object, *_: object) -> np.ndarray:
    """`torch._utils._rebuild_parameter`."""
    if not isinstance(tensor, np.ndarray):
        raise ValueError("a parameter of something else than a tensor")
    return tensor


def _set(values: object = ()) -> set[Any]:
    """Of few values: a list that is copied again and again is a bomb."""
    if not isinstance(values, list | tuple) or len(values) > _SET:
        raise ValueError(f"a set of something else than a list of at most {_SET}")
    return set(values)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function(lambda: _Dict()),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch", "Size"): _Function(_size),
    # A name, not numpy's dtype, which has a __setstate__ of its own.
    **{("torch", name): name for name in (*_STORAGES, *_DTYPES)},
    **{(module, "set"): _Function(_set) for module in ("builtins", "__builtin__")},
}


class _ForeignName(Exception):
    """The pickle asks for a function or class that is not in `_NAMES`."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: bytes, storage: Callable[[object], np.ndarray]) -> None:
        super().__init__(io.BytesIO(program))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _ForeignName(f"{module}.{name}"[:100])
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, numel = pid
        if kind != "storage" or name not in _STORAGES or type(numel) is not int:
            raise ValueError(f"a storage described as {kind!r} of {name!r}")
        dtype = _STORAGES[name]
        content = self._storage(key)
        if len(content) != numel * dtype.itemsize:
            raise ValueError(f"data/{key} has {len(content):,} bytes, for {numel:,} numbers of {dtype}")
        return _Storage(content.view(dtype))


def _run(path: Path, program: bytes, storage: Callable[[object], np.ndarray]) -> Any:
    try:
        return _Unpickler(program, storage).load()
    except InputError:
        raise
    except _ForeignName as error:
        raise InputError(
            f"{path} needs arbitrary code to load ({error}); refused. "
            "Where it comes from, save it again with the model's state_dict() and plain settings only"
        ) from None
    except Exception as error:  # a hostile pickle may raise anything
        raise InputError(f"{path} is damaged ({error!r:.100}); copy the file again") from None
