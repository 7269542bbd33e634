"""Reader of encoded text: memory-mapped token shards and their index.

A folder holds `index.json` and, for each split, `train-00000.bin` (little-endian
uint16, or uint32 where the vocabulary needs it) with `train-00000.starts`
(little-endian uint64: where in the shard each document begins). Every document
ends with the tokenizer's end_of_text. A document may go on in the next shard.

The index holds the SHA-256 of every file and, under `sha256`, of all else in it.
"""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np

from jaxgpt.chat import Template
from jaxgpt.data.statistics import Statistics, judge, measure, unknown_ids
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

FORMAT = "jaxgpt-shards"
VERSION = 1
INDEX = "index.json"
SEAL = "sha256"
SPLITS = ("train", "val")
DTYPES = ("<u2", "<u4")
START_DTYPE = np.dtype("<u8")
_SHARD = {"file": str, "starts": str, "tokens": int, "documents": int, "sha256": str, "starts_sha256": str}
_SPLIT = {"tokens": int, "documents": int, "shards": [_SHARD]}
_SHAPE = {
    "model_vocab_size": int,
    "statistics": {field.name: field.type for field in dataclasses.fields(Statistics)},
    "skipped": {"count": int, "shown": str},
    "plan": {"tokenizer": str, "template": (dict, NoneType)},
    "splits": dict.fromkeys(SPLITS, _SPLIT),
    "tokenizer": {},
}
"""What is read of an index: the type of each value, of each key of an object, of all items of a list."""


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of an encoded folder.

    Raises:
        InputError: there is none, or it is not one this version reads.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise InputError(f"{folder} holds no {INDEX}; encode text into it with `jaxgpt data encode`")
    index = read_json(path)
    if index is None:
        raise InputError(f"{path} is not a JSON object; encode the text into a new folder")
    if index.get("format") != FORMAT:
        raise InputError(f"{path} is not an index of token shards; encode the text into a new folder")
    if index.get("version") != VERSION:
        raise InputError(
            f"{path} has version {index.get('version')}, this program reads {VERSION}; "
            "encode the text into a new folder"
        )
    if not _has_shape(index, _SHAPE):
        raise InputError(
            f"{path} is damaged: a part of it is missing or of another type; encode the text into a new folder"
        )
    rows, size = index["model_vocab_size"], index.get("vocab_size")
    if index.get("dtype") not in DTYPES or type(size) is not int or not 1 <= size <= rows:
        raise InputError(
            f"{path} has dtype {index.get('dtype')!r} and vocab_size {size!r}, expected {' or '.join(DTYPES)} "
            f"and 1 to {rows}; encode the text into a new folder"
        )
    # Indexes of before they were sealed say it of the tokenizer alone.
    if not (is_sealed(index) if SEAL in index else sha256_of_json(index["tokenizer"]) == index["plan"]["tokenizer"]):
        raise InputError(f"{path} fails SHA-256; encode the text into a new folder")
    return index


def _has_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        parts = cast("dict[str, Any]", shape).items()
        return isinstance(value, dict) and all(name in value and _has_shape(value[name], part) for name, part in parts)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(item, shape[0]) for item in cast("list[Any]", value))
    return type(value) in (shape if isinstance(shape, tuple) else (shape,))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where something else is in it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The same JSON object with the SHA-256 of all else in it."""
    content = {name: value for name, value in content.items() if name != SEAL}
    return {**content, SEAL: sha256_of_json(content)}


def is_sealed(found: dict[str, Any]) -> bool:
    """Whether all of a JSON object is as it was when it was sealed."""
    return found == sealed(found)


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class TokenShards:
    """One split of an encoded folder as one long sequence of ids.

    Raises:
        InputError: no index, no such split, or a file that is missing or has
            another size than the index says.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder)
        self.split = split
        self.index = read_index(folder)
        self.files: list[dict[str, Any]] = self.index["splits"][split]["shards"]
        """Entries of the index: file, starts, tokens, documents, and both SHA-256."""
        if not self.files:
            raise InputError(f"{folder} holds no {split} tokens; encode with a held-out fraction above 0")
        self.dtype = np.dtype(self.index["dtype"])
        self.vocab_size: int = self.index["vocab_size"]
        """Ids that mean something; the model may embed more."""
        for file in self.files:
            self._check_size(file["file"], file["tokens"] * self.dtype.itemsize)
            self._check_size(file["starts"], file["documents"] * START_DTYPE.itemsize)
        self._first = np.cumsum([0] + [file["tokens"] for file in self.files])

    def _check_size(self, name: str, expected: int) -> None:
        path = self.folder / name
        if Path(name).name != name:
            raise InputError(f"{self.folder / INDEX} names {name}, outside its folder; refused")
        if not path.is_file():
            raise InputError(f"{path} is missing; encode the text into a new folder")
        if path.stat().st_size != expected:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, the index says {expected}; encode the text into a new folder"
            )

    @property
    def tokens(self) -> int:
        """Ids of all shards, end_of_text included."""
        return int(self._first[-1])

    @property
    def documents(self) -> int:
        """Documents that begin in this split."""
        return sum(file["documents"] for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the shards, as the index has them."""
        hashes = "".join(file["sha256"] + file["starts_sha256"] for file in self.files)
        return hashlib.sha256(hashes.encode()).hexdigest()

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins in the whole sequence (documents,), int64, ascending."""
        parts: list[np.ndarray] = []
        for file, first in zip(self.files, self._first[:-1], strict=True):
            parts.append(np.fromfile(self.folder / file["starts"], START_DTYPE).astype(np.int64) + first)
        starts = np.concatenate(parts)
        if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= self.tokens:
            raise InputError(
                f"{self.folder}: documents of {self.split} do not begin in order; encode the text into a new folder"
            )
        return starts

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.memmap(self.folder / file["file"], self.dtype, mode="r") for file in self.files]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids `start:stop` of the sequence, int32, cut at its end.

        Raises:
            InputError: an id outside the vocabulary, with the file and the number
                of the token in it.
        """
        parts: list[np.ndarray] = []
        stop = min(stop, self.tokens)
        shard = int(np.searchsorted(self._first, start, "right")) - 1
        while start < stop:
            first = int(self._first[shard])
            part = self._maps[shard][start - first : stop - first]
            self._check_range(part, shard, start - first)
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def _check_range(self, part: np.ndarray, shard: int, offset: int) -> None:
        if part.max() < self.vocab_size:
            return
        at = int(np.argmax(part >= self.vocab_size))
        raise InputError(
            f"token {part[at]} outside vocabulary 0–{self.vocab_size - 1} "
            f"({self.files[shard]['file']} offset {offset + at}); encode the text into a new folder"
        )

    def verify(self) -> None:
        """Compare every file with its SHA-256 and every id with the vocabulary; raises InputError."""
        for shard, file in enumerate(self.files):
            for name, expected in ((file["file"], file["sha256"]), (file["starts"], file["starts_sha256"])):
                if sha256_of(self.folder / name) != expected:
                    raise InputError(f"{self.folder / name} fails SHA-256; encode the text into a new folder")
            self._check_range(self._maps[shard], shard, 0)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the text was encoded with."""
        return Tokenizer.from_state(self.index["tokenizer"], self.index["model_vocab_size"])

    def template(self) -> Template | None:
        """The chat template whose markers the tokenizer knows, if it was made for one."""
        saved = self.index["plan"]["template"]
        return Template.from_dict(saved) if saved else None

    def judge_first_shard(self, *, accept: bool = False) -> Statistics:
        """Statistics of the first shard; refused where they look broken (see `statistics.judge`)."""
        self._check_range(self._maps[0], 0, 0)
        counts = np.bincount(self._maps[0], minlength=self.vocab_size)
        tokenizer = self.tokenizer()
        statistics = measure(counts, self.files[0]["documents"], unknown_ids(tokenizer))
        what = str(self.folder / self.files[0]["file"])
        judge(statistics, what, unknown_cause=tokenizer.unknown_cause, accept=accept, flag="--accept-loss")
        return statistics
