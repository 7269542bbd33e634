"""The catalogue of hostile files: for each what writes it, the command that meets it, and words of the refusal."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import hostile_gguf
import hostile_pt
import hostile_vocabularies
import hostile_weights
from small_vocabularies import noted

Base = Literal["gpt2", "llama", "wide", "nothing"]


@dataclass(frozen=True)
class Hostile:
    """One way to lie."""

    write: Callable[[Path], object]
    """Changes the folder, which is a copy of `base`."""
    words: str
    """A pattern that the one line on stderr has."""
    base: Base = "nothing"
    """A valid model folder: `wide` has room for a vocabulary of 705 tokens."""
    given: str = "."
    """What of the folder the command is given."""
    verb: Literal["import", "inspect"] = "import"


def _file(write: Callable[[Path], object], name: str, folder: Path) -> None:
    write(folder / name)


def _bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _template(source: str, folder: Path) -> None:
    noted(folder, {"chat_template": source})


def _entries() -> Iterator[tuple[str, Hostile]]:
    for name, (write, words) in hostile_weights.REFUSED.items():
        yield f"weights: {name}", Hostile(write, re.escape(words), "gpt2")
    for name, (write, words) in hostile_weights.CONFIGS.items():
        yield f"config: {name}", Hostile(write, re.escape(words), "llama")
    for name, (write, words) in hostile_pt.FILES.items():
        yield f"pt: {name}", Hostile(partial(_file, write, "a.pt"), words, given="a.pt")
    for name in (*hostile_pt.LIES, *hostile_pt.CONTAINERS):
        if name not in hostile_pt.READ_BY_INSPECT:
            write, words = hostile_pt.FILES[name]
            yield f"inspect pt: {name}", Hostile(partial(_file, write, "a.pt"), words, given="a.pt", verb="inspect")
    for name, (content, words) in hostile_gguf.LIES.items():
        write = partial(_file, partial(_bytes, content), "a.gguf")
        yield f"gguf: {name}", Hostile(write, f"a.gguf .*{re.escape(words)}", given="a.gguf", verb="inspect")
    for name, (change, words) in hostile_vocabularies.HOSTILE.items():
        yield f"tokenizer: {name}", Hostile(partial(hostile_vocabularies.changed, change), re.escape(words), "wide")
    for name, (content, words) in hostile_vocabularies.RAW.items():
        write = partial(_file, partial(_bytes, content), "tokenizer.json")
        yield f"tokenizer: {name}", Hostile(write, re.escape(words), "wide")
    for name, (file, content, words) in hostile_vocabularies.BAD.items():
        write = partial(_file, partial(_bytes, content), file)
        yield f"templates: {name}", Hostile(write, words, "wide")
    for source, words in hostile_vocabularies.HARMFUL.items():
        yield f"template: {source[:40]}", Hostile(partial(_template, source), words, "wide")


CATALOGUE = dict(_entries())
BOMBS = (
    "weights: 250,000 sizes",
    "weights: a header of 3 MB of tensors",
    "weights: a header of brackets",
    "weights: size bomb",
    "config: 3 MB of empty lists",
    "pt: a key of 2^60 values",
    "pt: a key 200,000 tuples deep",
    "pt: a size copied until memory ends",
    "pt: a set copied until memory ends",
    "pt: a million lists in each other",
    "pt: a compressed archive",
    "pt: entries of the same bytes",
    "pt: one tensor under 3,000 names",
    "gguf: length of an array of texts",
    "tokenizer: a normalizer that blows up",
    "template: {{ 'a' * 10**9 }}",
)
"""Those that would take memory; measured in a process of their own."""
