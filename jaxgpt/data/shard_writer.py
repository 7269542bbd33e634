"""Writes the ids of one split as shards; what is on disk under its name is whole."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.corpus import Piece, Split
from jaxgpt.data.shards import START_DTYPE, is_sealed, read_json, sealed, sha256_of
from jaxgpt.errors import InputError
from jaxgpt.regular_files import is_there

PARTIAL = "partial"
"""Folder of the records of finished shards, there until the index is written."""


class ShardWriter:
    """Collects the ids of one split and writes a shard whenever there are enough.

    A shard is finished when its record lies in PARTIAL: the record is written
    after the shard's files are on disk under their names.
    """

    def __init__(self, out: Path, split: Split, shard_tokens: int, dtype: np.dtype[Any]):
        self.out = out
        self.split = split
        self.shard_tokens = shard_tokens
        self.dtype = dtype
        self.shards: list[dict[str, Any]] = []
        self.resume_at = (0, 0)
        """Position of the first piece that no finished shard holds."""
        self._clear()
        self._load_records()

    def _clear(self) -> None:
        self._parts: list[np.ndarray] = []
        self._starts: list[int] = []
        self._tokens = 0

    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def _load_records(self) -> None:
        while is_there(path := self.out / PARTIAL / f"{self._name()}.json") and (record := self._finished(path)):
            self.shards.append(record["shard"])
            self.resume_at = (record["next"][0], record["next"][1])

    def _finished(self, path: Path) -> dict[str, Any] | None:
        """The record of a shard; None where it or the shard is damaged, which is then written again."""
        record = read_json(path)
        if record is None or not is_sealed(record):
            return None
        shard = record["shard"]
        intact = all(
            (self.out / shard[name]).is_file() and sha256_of(self.out / shard[name]) == shard[digest]
            for name, digest in (("file", "sha256"), ("starts", "starts_sha256"))
        )
        return record if intact else None

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Append the ids of a piece; pieces come in order of position."""
        if piece.is_first:
            self._starts.append(self._tokens)
        self._parts.append(ids)
        self._tokens += len(ids)
        number, part = piece.position
        self._next = (number + 1, 0) if piece.is_last else (number, part + 1)
        if self._tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the collected ids as a shard, if there are any."""
        if not self._tokens:
            return
        name = self._name()
        shard = {"file": f"{name}.bin", "starts": f"{name}.starts", "tokens": self._tokens}
        shard["documents"] = len(self._starts)
        shard["sha256"] = write(self.out / f"{name}.bin", np.concatenate(self._parts).tobytes())
        shard["starts_sha256"] = write(self.out / f"{name}.starts", np.asarray(self._starts, START_DTYPE).tobytes())
        write(self.out / PARTIAL / f"{name}.json", as_json(sealed({"shard": shard, "next": self._next})))
        self.shards.append(shard)
        self._clear()


def write(path: Path, content: bytes) -> str:
    """Write a file so that it is either whole or absent, also after a power cut; its SHA-256."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason, remedy = error.strerror, "put that right"
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            reason, remedy = f"disk full (need {len(content):,} bytes, {free:,} free)", "free some space"
        raise InputError(f"{path} was not saved: {reason}; {remedy} and run the same command again") from None
    return hashlib.sha256(content).hexdigest()


def as_json(value: Any) -> bytes:
    """Indented JSON with a newline at its end."""
    return (json.dumps(value, indent=1) + "\n").encode()
