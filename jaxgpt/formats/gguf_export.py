"""A checkpoint as one GGUF file, through the gguf package: llama.cpp's own writer and quantiser.

Tensors are converted and written one by one, beside the file's final name; the file
is read back and takes its name only when every byte is there.
"""

import errno
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from jaxgpt import checkpoint, manifest, weights
from jaxgpt.array_files import in_bytes
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError, first
from jaxgpt.formats import gguf_header, gguf_metadata, gguf_tokenizer
from jaxgpt.formats.gguf_metadata import Metadata
from jaxgpt.step_folder import GOLDEN
from jaxgpt.weights import GGUFTensor

if TYPE_CHECKING:
    import gguf

Dtype = Literal["keep", "float32", "float16", "bfloat16", "q8_0"]
Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers for files that are mostly of that type (`llama_ftype`)."""
_BLOCK = 32
"""Values of a row that share a scale in Q8_0."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, and the type it is written as."""

    name: str
    shape: tuple[int, ...]
    type: str
    """F32, F16, BF16 or Q8_0."""
    make: Callable[[], np.ndarray]
    """Its values, of any dtype."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        values = math.prod(self.shape)
        # A block is one float16 and 32 bytes.
        return values // _BLOCK * (_BLOCK + 2) if self.type == "Q8_0" else values * (4 if self.type == "F32" else 2)


def export_gguf(
    directory: str | Path, out: str | Path, *, dtype: Dtype = "keep", progress: Progress | None = None
) -> list[str]:
    """Make a GGUF file of a checkpoint; lines the caller should print.

    Args:
        directory: a run folder, or one step's folder.
        out: the file to write; must not exist.
        dtype: of matrices; vectors and learned positions are float32, as llama.cpp has them.
        progress: hears of every tensor.

    Raises:
        InputError: as `checkpoint.load` and `write` do.
    """
    _refuse_existing(Path(out))
    gguf_header.require_package()
    source = checkpoint.load(directory, mapped=True)
    notices = write(source, out, dtype=dtype, progress=progress)
    if (source.path / GOLDEN).is_file():
        notices.append(f"{GOLDEN} is left out: a GGUF file has no place for it; an export as hf carries it")
    return notices


def write(source: Checkpoint, out: str | Path, *, dtype: Dtype = "keep", progress: Progress | None = None) -> list[str]:
    """Write the file; lines the caller should print.

    Raises:
        InputError: llama.cpp cannot compute the model, values that the dtype cannot hold,
            OUT exists, the disk is full, or the file read back differs.
    """
    out = Path(out).absolute()
    _refuse_existing(out)
    gguf_header.require_package()
    entries, notices = _metadata(source, out.stem)
    planned = _plan(source, dtype)
    if dtype == "q8_0":
        notices += _not_quantised(planned)
    beside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    needed = sum(stored.size for stored in planned)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(out.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sums = _write_file(beside, entries, planned, progress or (lambda done, total: None))
        manifest.sync(beside)
        _check(beside, planned, sums)
        beside.rename(out)
        manifest.sync(out.parent)
    except OSError as error:
        raise InputError(f"{out} was not written: {_reason(error, out.parent, needed)}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return notices


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; choose another name")


def _reason(error: OSError, folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder).free if folder.is_dir() else needed
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or free < needed:
        return f"disk full (need {in_bytes(needed)}, {in_bytes(free)} free)"
    # numpy says how much it wrote, not why that was not all.
    return error.strerror or f"a write fell short ({error}); look for a limit on the size of files"


def _metadata(source: Checkpoint, name: str) -> tuple[Metadata, list[str]]:
    model, notices = gguf_metadata.metadata(source.config, name)
    rows, ends = source.config.vocab_size, source.eos_token_ids
    tokenizer, more = gguf_tokenizer.metadata(source.tokenizer, source.template, rows, ends)
    return {**model, **tokenizer}, [*notices, *more]


# -- What is written as what -----------------------------------------------------------


def _plan(source: Checkpoint, dtype: Dtype) -> list[Stored]:
    planned = [
        Stored(tensor.name, tensor.shape, _type(tensor, source.params, dtype), partial(tensor.of, source.params))
        for tensor in weights.gguf_tensors(source.config)
    ]
    factors = gguf_metadata.rope_factors(source.config)
    if factors is not None:
        planned.append(Stored("rope_freqs.weight", factors.shape, "F32", lambda: factors))
    return planned


def _type(tensor: GGUFTensor, params: Mapping[str, Any], dtype: Dtype) -> str:
    """As convert_hf_to_gguf.py of llama.cpp decides."""
    if len(tensor.shape) == 1 or tensor.name == "position_embd.weight":
        return "F32"
    if dtype == "q8_0":
        return "Q8_0" if tensor.shape[-1] % _BLOCK == 0 else "F16"
    if dtype != "keep":
        return _STORED[dtype]
    found = {str(params[part.name].dtype) for part in tensor.parts}
    return _STORED[found.pop()] if len(found) == 1 else "F32"


def _not_quantised(planned: list[Stored]) -> list[str]:
    names = [stored.name for stored in planned if stored.type == "F16"]
    if not names:
        return []
    return [f"{len(names)} matrices stay float16: Q8_0 needs rows of a multiple of {_BLOCK} ({first(names)})"]


def _converted(array: np.ndarray, stored: Stored) -> np.ndarray:
    """The tensor as its bytes in the file, (rows, bytes of a row).

    Raises:
        InputError: a value that was finite and is not any more.
    """
    import ml_dtypes
    from gguf import GGMLQuantizationType, quants

    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if stored.type == "Q8_0":
        # Some rows at a time: in float32 all of them may be four times the file.
        pieces = np.array_split(array, max(1, min(len(array), array.size >> 22)))
        with np.errstate(all="ignore"):
            quantised = [quants.quantize(rows.astype(np.float32), GGMLQuantizationType.Q8_0) for rows in pieces]
        found = np.concatenate(quantised)
        scales = found.reshape(-1, _BLOCK + 2)[:, :2].copy().view(np.float16)
        whole = bool(np.isfinite(scales).all())
    else:
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(array, dtypes[stored.type])
        narrowed = found.dtype != array.dtype and stored.type != "F32"
        whole = not narrowed or bool((np.isfinite(found) | ~np.isfinite(array)).all())
    if not whole:
        raise InputError(f"{stored.name} has values that {stored.type} cannot hold; export with another --dtype")
    return found.reshape(found.shape[0], -1).view(np.uint8)


# -- The file --------------------------------------------------------------------------


def _write_file(path: Path, entries: Metadata, planned: list[Stored], progress: Progress) -> list[int]:
    """Write everything; the CRC-32 of every tensor's bytes."""
    import gguf

    from jaxgpt.formats import gguf_writer

    writer = gguf_writer.Writer(path, str(entries["general.architecture"]))
    try:
        _add_metadata(writer, entries, planned)
        for stored in planned:
            # With its own number of bytes, the shape is that of values, whatever they are written as.
            kind, shape = gguf.GGMLQuantizationType[stored.type], stored.shape
            writer.add_tensor_info(stored.name, shape, np.dtype(np.float32), stored.size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sums: list[int] = []
        done, total = 0, sum(stored.size for stored in planned)
        for found, crc in _ahead(planned):
            writer.write_tensor_data(found)
            sums.append(crc)
            done += found.nbytes
            progress(done, total)
        return sums
    finally:
        with suppress(OSError):
            writer.close()


def _ahead(planned: list[Stored]) -> Iterator[tuple[np.ndarray, int]]:
    """Each tensor's bytes and their CRC-32; the next is converted while one is written."""

    def made(stored: Stored) -> tuple[np.ndarray, int]:
        found = _converted(stored.make(), stored)
        return found, zlib.crc32(found.data)

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[tuple[np.ndarray, int]] | None = None
        for stored in planned:
            following = pool.submit(made, stored)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _add_metadata(writer: "gguf.GGUFWriter", entries: Metadata, planned: list[Stored]) -> None:
    matrices = [stored.type for stored in planned if len(stored.shape) > 1]
    writer.add_file_type(_FILE_TYPES[max(sorted(set(matrices)), key=matrices.count)])
    if "Q8_0" in matrices:
        writer.add_quantization_version(2)
    for key, value in entries.items():
        if key == "general.architecture":  # added by the writer
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _check(path: Path, planned: list[Stored], sums: list[int]) -> None:
    """Read the file back: every tensor under its name, of its shape and type, with the bytes that were written."""
    found = gguf_header.read(path).tensors
    expected = [(stored.name, stored.shape, stored.type, stored.size) for stored in planned]
    wrong = [] if len(found) == len(expected) else [f"{len(found)} of {len(expected)} tensors"]
    with path.open("rb") as file:
        for entry, row, crc in zip(found, expected, sums, strict=False):
            file.seek(entry.start)
            if (entry.name, entry.shape, entry.dtype, entry.size) != row or _crc(file, entry.size) != crc:
                wrong.append(entry.name)
    if wrong:
        raise InputError(f"{path.name} read back differs from what was written ({first(wrong)}); check the disk")


def _crc(file: BinaryIO, size: int) -> int:
    crc = 0
    while size:
        block = file.read(min(size, 1 << 22))
        if not block:
            return -1
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc
