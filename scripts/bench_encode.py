"""`data encode` against the programs it encodes with, alternating in one run.

With gpt2 the peer is tiktoken's `encode_ordinary` in one thread; with a tokenizer.json it
is the tokenizers package's own `encode_batch_fast`, which uses every core. The peers get
the texts in memory and keep nothing; ours reads files, checks a sample, encodes, counts and
writes shards. The tokenizer.json is trained here, on the same texts, with Qwen2's rule.
The median ratio of paired rounds is the figure to quote; the ratio of processor time
is the one that other work on the machine disturbs least. Prints one JSON line last.

    python scripts/bench_encode.py                     # the standard library's source
    python scripts/bench_encode.py --source FOLDER --rounds 9
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
from tokenizers import trainers

from jaxgpt.chat import CHATML
from jaxgpt.data import encode
from jaxgpt.data.sources import documents
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer_choice import chosen
from jaxgpt.vocabularies import split_rules
from jaxgpt.vocabularies.byte_alphabet import CHARACTERS
from jaxgpt.vocabularies.kinds import Encoder

PARTS = {"_survey": "reading", "_sample": "sample", "_encode_all": "encoding", "_finish": "index"}
WANTED = {"gpt2": 1.5, "tokenizer.json": 1.0}


@dataclass
class Rounds:
    """Seconds of a pair, round by round."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    ours_processor: list[float] = field(default_factory=list)
    peer_processor: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS.values()})

    def result(self) -> dict[str, Any]:
        """Medians, and ratios above 1 where ours is faster."""
        pairs = zip(self.peer, self.ours, strict=True)
        processor = zip(self.peer_processor, self.ours_processor, strict=True)
        return {
            "ratio": round(statistics.median(peer / ours for peer, ours in pairs), 3),
            "processor_ratio": round(statistics.median(peer / ours for peer, ours in processor), 3),
            "ours_s": round(statistics.median(self.ours), 3),
            "peer_s": round(statistics.median(self.peer), 3),
            "parts_s": {name: round(statistics.median(spent), 3) for name, spent in self.parts.items()},
        }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall and of all processors."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


@contextlib.contextmanager
def parts_timed(parts: dict[str, list[float]]) -> Generator[None]:
    """Notes how long each part of an encode takes."""

    def noting(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            value = function(*args)
            spent.append(time.perf_counter() - begin)
            return value

        return call

    with contextlib.ExitStack() as stack:
        for function, name in PARTS.items():
            wrapped = noting(getattr(encode, function), parts[name])
            stack.enter_context(mock.patch.object(encode, function, wrapped))
        yield


def trained(texts: list[str], size: int, path: Path) -> None:
    """A byte-level BPE with Qwen2's rule."""
    rule = split_rules.RULES["qwen2"]
    sections = {
        "version": "1.0", "added_tokens": [], "normalizer": rule.normalizer, "pre_tokenizer": rule.pre_tokenizer,
        "decoder": split_rules.byte_level(use_regex=True), "model": {"type": "BPE", "vocab": {}, "merges": []},
    }  # fmt: skip
    library = tokenizers.Tokenizer.from_str(json.dumps(sections))
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=CHARACTERS)
    library.train_from_iterator(texts, trainer)
    library.save(str(path))


def one_thread(encoder: Encoder, texts: list[str]) -> None:
    for text in texts:
        encoder.encode_ordinary(text)  # tiktoken's own function


def measure(
    source: str, tokenizer: Tokenizer, peer: Callable[[], object], rounds: int, folder: Path, name: str
) -> Rounds:
    found = Rounds()

    def ours() -> None:
        encode.encode(source, folder / "out", tokenizer, val_fraction=0.05, accept=True)

    peer()
    for number in range(rounds):
        with parts_timed(found.parts):
            wall, processor = timed(ours)
        shutil.rmtree(folder / "out")
        found.ours.append(wall)
        found.ours_processor.append(processor)
        wall, processor = timed(peer)
        found.peer.append(wall)
        found.peer_processor.append(processor)
        print(f"{name} round {number + 1}: ours {found.ours[-1]:.2f} s, peer {wall:.2f} s", file=sys.stderr)
    return found


def table(results: dict[str, dict[str, Any]], megabytes: float) -> None:
    print("| vocabulary | jaxgpt data encode | peer | ratio | of processor time | wanted |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        rates = (f"{megabytes / found[key]:.1f} MB/s" for key in ("ours_s", "peer_s"))
        ratios = f"**{found['ratio']:.2f}** | {found['processor_ratio']:.2f} | ≥ {WANTED[name]:g}"
        print(f"| {name} | {' | '.join(rates)} | {ratios} |")
    for name, found in results.items():
        print(f"{name}: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in found["parts_s"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=30_000, help="tokens of the tokenizer.json")
    parser.add_argument("--quick", action="store_true", help="one round and a small vocabulary")
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    arguments = parser.parse_args()
    rounds, size = (1, 500) if arguments.quick else (arguments.rounds, arguments.vocabulary)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = [document.text for document in documents(arguments.source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    versions = {name: importlib.metadata.version(name) for name in ("tiktoken", "tokenizers", "numpy")}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as name:
        folder = Path(name)
        trained(texts, size, folder / "tokenizer.json")
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        gpt2, _ = chosen("gpt2", CHATML)
        other, _ = chosen(str(folder / "tokenizer.json"), CHATML)
        pairs: dict[str, tuple[Tokenizer, Callable[[], object]]] = {
            "gpt2": (gpt2, lambda: one_thread(gpt2.encoder, texts)),
            "tokenizer.json": (other, lambda: library.encode_batch_fast(texts, add_special_tokens=False)),
        }
        for kind, (tokenizer, peer) in pairs.items():
            results[kind] = measure(arguments.source, tokenizer, peer, rounds, folder, kind).result()
    if not arguments.json:
        print(f"{megabytes:.1f} MB in {len(texts)} documents, {os.cpu_count()} cores, {versions}")
        table(results, megabytes)
    about = {"benchmark": "encode", "source": arguments.source, "megabytes": round(megabytes, 1), "rounds": rounds}
    print(json.dumps({**about, "documents": len(texts), "versions": versions, **results}))


if __name__ == "__main__":
    main()
