"""From documents to token shards, in parallel and resumable.

The bytes written depend on the documents, the tokenizer, the shard size and the
held-out fraction only: not on the number of workers, and not on how often the
encode was interrupted.
"""

import dataclasses
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgpt.chat import Template
from jaxgpt.data.corpus import Corpus, Item, Piece, name_bytes, pieces_of, place
from jaxgpt.data.shard_writer import PARTIAL, ShardWriter, as_json, write
from jaxgpt.data.shards import (
    FORMAT,
    INDEX,
    SPLITS,
    VERSION,
    TokenShards,
    read_index,
    read_json,
    sealed,
    sha256_of_json,
)
from jaxgpt.data.sources import STDLIB, Skipped
from jaxgpt.data.statistics import Statistics, judge, measure, unknown_ids
from jaxgpt.errors import InputError, first
from jaxgpt.regular_files import is_there
from jaxgpt.tokenizer import Tokenizer

SAMPLE_DOCUMENTS = 100
SAMPLE_TOKENS = 32_768
KEPT = 2**26
"""Characters of texts that stay in memory once read; a larger corpus is read again from its files."""


@dataclass(frozen=True)
class Progress:
    """Where an encode is."""

    stage: Literal["reading", "encoding"]
    done: int
    """Characters."""
    total: int
    """Characters; 0 while they are being counted."""
    tokens: int
    sample: Statistics | None
    """The judged first documents; None while reading."""


@dataclass(frozen=True)
class EncodeReport:
    """What an encode has written."""

    folder: Path
    index: dict[str, Any]
    """The content of index.json."""
    statistics: Statistics
    """Of all tokens of both splits."""

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {part['tokens']:,}" for name, part in self.index["splits"].items())
        skipped: dict[str, Any] = self.index["skipped"]
        lost = f"; skipped {skipped['count']:,} without text: {skipped['shown']}" if skipped["count"] else ""
        return f"{self.statistics} ({splits} tokens){lost}"


def encode(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    template: Template | None = None,
    shard_tokens: int = 10_000_000,
    val_fraction: float = 0.0,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    accept: bool = False,
) -> EncodeReport:
    """Encode the documents of `sources` into shards of about `shard_tokens` in `out`.

    The held-out split takes the documents whose name hashes below `val_fraction`, or
    the lowest where none does; of one single text file it takes the last
    `val_fraction`. The tokenizer and the chat `template` whose markers it knows are
    kept with the shards, so that a model trained on them needs no other input. An
    interrupted encode is continued by the same call; a finished one is returned as it is.

    Raises:
        InputError: before anything is written: a source cannot be read, a row is
            malformed, a split would be empty, the first 100 documents or 32 K
            tokens look broken (unless `accept`), or `out` holds something else.
            Later: a file cannot be written.
    """
    out = Path(out)
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if shard_tokens < 1 or not 0.0 <= val_fraction < 1.0:
        raise InputError(f"expected shard_tokens >= 1 and 0 <= val_fraction < 1, got {shard_tokens} and {val_fraction}")
    _refuse_out_inside_source(sources, out)
    report = progress or (lambda _: None)
    corpus = Corpus(tuple(sources), val_fraction)
    survey = _survey(corpus, report)
    plan = {
        "sources": survey.sha256,
        "tokenizer": sha256_of_json(tokenizer.state()),
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
        "template": template.to_dict() if template else None,
    }
    if _is_finished(out, plan):
        return _report(out)
    sample = _sample(survey, tokenizer)
    what = f"first {sample.documents} documents of {survey.documents}"
    judge(sample, what, unknown_cause=tokenizer.unknown_cause, accept=accept)
    _begin(out, plan)
    writers = {split: ShardWriter(out, split, shard_tokens, _dtype(tokenizer)) for split in SPLITS}
    _encode_all(survey, sample, tokenizer, writers, workers or _cores(), report)
    for writer in writers.values():
        writer.flush()
    _finish(out, plan, survey, tokenizer, writers)
    return _report(out)


# -- Before anything is written ------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    documents: int
    characters: int
    skipped: tuple[Skipped, ...]
    sha256: str
    """Over names, splits and texts."""
    items: Callable[[], Iterable[Item]]
    """The documents and what was skipped, from memory where they fit."""


def _survey(corpus: Corpus, report: Callable[[Progress], None]) -> _Survey:
    """Read everything once: a malformed last row must not surface after hours of encoding."""
    digest = hashlib.sha256()
    counts = dict.fromkeys(SPLITS, 0)
    characters = 0
    skipped: list[Skipped] = []
    kept: list[Item] = []
    for item in corpus.documents():
        if characters <= KEPT:
            kept.append(item)
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        split, document = item
        text = document.text.encode()
        digest.update(f"{split} {len(text)} ".encode() + name_bytes(document.name) + b"\0")
        digest.update(text)
        counts[split] += 1
        characters += len(document.text)
        report(Progress("reading", characters, 0, 0, None))
        if characters > KEPT:
            kept.clear()
    total = sum(counts.values())
    if corpus.val_fraction and not counts["val"] and total > 1 and corpus.always_held_out is None:
        lowest = min((item[1].name for item in corpus.documents() if not isinstance(item, Skipped)), key=place)
        return _survey(dataclasses.replace(corpus, always_held_out=lowest), report)
    if not total:
        raise InputError(f"no text in {first([str(s) for s in corpus.sources])}; give files with UTF-8 text")
    if not counts["train"] or (corpus.val_fraction and not counts["val"]):
        lacks = "val" if counts["train"] else "train"
        raise InputError(
            f"val_fraction {corpus.val_fraction:g} of {total} documents leaves none for {lacks}; "
            f"choose a {'larger' if lacks == 'val' else 'smaller'} --val-fraction or give more documents"
        )
    items = corpus.documents if characters > KEPT else lambda: kept
    return _Survey(total, characters, tuple(skipped), digest.hexdigest(), items)


def _sample(survey: _Survey, tokenizer: Tokenizer) -> Statistics:
    arrays: list[np.ndarray] = []
    documents = tokens = 0
    for piece in pieces_of(survey.items(), whole=not tokenizer.cuts_before_spaces):
        if tokens >= SAMPLE_TOKENS or (piece.is_first and documents == SAMPLE_DOCUMENTS):
            break
        documents += piece.is_first
        arrays += _ids([piece], tokenizer, np.dtype("<u4"))
        tokens += len(arrays[-1])
    counts = np.bincount(np.concatenate(arrays), minlength=tokenizer.vocab_size)
    return measure(counts, documents, unknown_ids(tokenizer))


def _refuse_out_inside_source(sources: Sequence[str | Path], out: Path) -> None:
    for source in sources:
        if source != STDLIB and out.resolve().is_relative_to(Path(source).resolve()):
            raise InputError(f"the output {out} lies inside the source {source}; choose a folder outside it")


def _is_finished(out: Path, plan: dict[str, Any]) -> bool:
    """Whether `out` already holds this encode; refuse anything that is not it or its beginning."""
    if (out / INDEX).exists():
        _refuse_other_plan(out, read_index(out)["plan"], plan)
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        return True
    if is_there(path := out / PARTIAL / "plan.json"):
        if (found := read_json(path)) is None:
            raise InputError(f"{path} is not a JSON object; remove {out} or choose another folder")
        _refuse_other_plan(out, found, plan)
    elif out.exists() and (not out.is_dir() or any(path.name != PARTIAL for path in out.iterdir())):
        raise InputError(f"{out} is not empty and holds no encoded text; choose a new folder")
    return False


def _refuse_other_plan(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    changed = [key for key in plan if found.get(key) != plan[key]]
    if changed:
        raise InputError(f"{out} holds an encode with other {first(changed)}; remove it or choose another folder")


# -- Encoding ------------------------------------------------------------------------


def _ids(pieces: Sequence[Piece], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> list[np.ndarray]:
    end = np.asarray([tokenizer.special("end_of_text").id], dtype)
    none = end[:0]
    encoded = tokenizer.encode_batch([piece.text for piece in pieces])
    return [
        np.concatenate([ids.astype(dtype), end if piece.is_last else none])
        for piece, ids in zip(pieces, encoded, strict=True)
    ]


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.model_vocab_size < 65536 else "<u4")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_all(
    survey: _Survey,
    sample: Statistics,
    tokenizer: Tokenizer,
    writers: "dict[str, ShardWriter]",
    workers: int,
    report: Callable[[Progress], None],
) -> None:
    done = 0
    tokens = sum(shard["tokens"] for writer in writers.values() for shard in writer.shards)

    def todo() -> Iterator[Piece]:
        nonlocal done
        for piece in pieces_of(survey.items(), whole=not tokenizer.cuts_before_spaces):
            if piece.position < writers[piece.split].resume_at:
                done += len(piece.text)
            else:
                yield piece

    dtype, size = _dtype(tokenizer), tokenizer.encoder.batch_characters
    for pieces, arrays in _in_parallel(_jobs(todo(), size), lambda pieces: _ids(pieces, tokenizer, dtype), workers):
        for piece, ids in zip(pieces, arrays, strict=True):
            writers[piece.split].add(piece, ids)
            done += len(piece.text)
            tokens += len(ids)
        report(Progress("encoding", done, survey.characters, tokens, sample))


def _jobs(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Small documents together, `size` characters, so that handing them to a worker costs nothing."""
    job: list[Piece] = []
    characters = 0
    for piece in pieces:
        job.append(piece)
        characters += len(piece.text)
        if characters >= size:
            yield job
            job, characters = [], 0
    if job:
        yield job


def _in_parallel(
    jobs: Iterator[list[Piece]], work: Callable[[list[Piece]], list[np.ndarray]], workers: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Jobs and their results, in order.

    Threads, because BPE runs in native code without the interpreter's lock.
    """
    pending: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            pending.append((job, pool.submit(work, job)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


def _begin(out: Path, plan: dict[str, Any]) -> None:
    try:
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out / PARTIAL} cannot be made ({error.strerror}); choose another folder") from None
    write(out / PARTIAL / "plan.json", as_json(plan))


def _finish(
    out: Path, plan: dict[str, Any], survey: _Survey, tokenizer: Tokenizer, writers: dict[str, ShardWriter]
) -> None:
    splits = {
        split: {
            "tokens": sum(shard["tokens"] for shard in writer.shards),
            "documents": sum(shard["documents"] for shard in writer.shards),
            "shards": writer.shards,
        }
        for split, writer in writers.items()
    }
    statistics = _statistics_of_files(out, splits, tokenizer)
    skipped = [f"{item.name} ({item.reason})" for item in survey.skipped]
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": _dtype(tokenizer).str,
        "vocab_size": tokenizer.vocab_size,
        "model_vocab_size": tokenizer.model_vocab_size,
        "statistics": statistics.to_dict(),
        "skipped": {"count": len(skipped), "shown": first(skipped)},
        "plan": plan,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }
    write(out / INDEX, as_json(sealed(index)))
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _statistics_of_files(out: Path, splits: dict[str, dict[str, Any]], tokenizer: Tokenizer) -> Statistics:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for split in splits.values():
        for shard in split["shards"]:
            ids = np.memmap(out / shard["file"], _dtype(tokenizer), mode="r")
            counts += np.bincount(ids, minlength=len(counts))
    return measure(counts, sum(split["documents"] for split in splits.values()), unknown_ids(tokenizer))


def _report(out: Path) -> EncodeReport:
    index = read_index(out)
    for split in SPLITS:
        if index["splits"][split]["shards"]:
            TokenShards(out, split)  # sizes
    return EncodeReport(out, index, Statistics(**index["statistics"]))
