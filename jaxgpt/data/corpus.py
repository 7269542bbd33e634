"""The documents of several sources, each with its split, cut into pieces for encoding."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.data.sources import Document, Skipped, files, read
from jaxgpt.vocabularies.text_cuts import cut

PIECE = 2**18
"""Characters after which a long document is cut for encoding; its ids stay the same."""

Split = Literal["train", "val"]

Item = tuple[Split, Document] | Skipped
"""A document and where it belongs, or a file without text."""


@dataclass(frozen=True)
class Corpus:
    """The documents of several sources and the split each belongs to."""

    sources: tuple[str | Path, ...]
    val_fraction: float
    always_held_out: str | None = None
    """Name of a document that is held out whatever its hash, where too few are by theirs."""

    def documents(self) -> Iterator[Item]:
        """Every document in order, and what was skipped."""
        found = [file for source in self.sources for file in files(source)]
        only_one_text = len(found) == 1 and found[0].path.suffix != ".jsonl"
        for file in found:
            for item in read(file):
                if isinstance(item, Skipped):
                    yield item
                elif only_one_text and self.val_fraction:
                    yield from self._tail_held_out(item)
                else:
                    yield ("val" if self._holds_out(item.name) else "train"), item

    def _holds_out(self, name: str) -> bool:
        return name == self.always_held_out or place(name) < self.val_fraction

    def _tail_held_out(self, document: Document) -> Iterator[tuple[Split, Document]]:
        text = document.text
        middle = int(len(text) * (1.0 - self.val_fraction))
        # At the end of a line, unless that would change the fraction much.
        at = text.rfind("\n", middle - middle // 10, middle) + 1 or middle
        parts: tuple[tuple[Split, str], ...] = (("train", text[:at]), ("val", text[at:]))
        for split, part in parts:
            if part:
                yield split, Document(document.name, part)


def place(name: str) -> float:
    """Where a document's name falls between 0 and 1: below the held-out fraction it is held out."""
    digest = hashlib.sha256(name_bytes(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def name_bytes(name: str) -> bytes:
    """A document's name as bytes; a file's name may hold some that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Piece:
    """A part of a document, encoded by itself."""

    position: tuple[int, int]
    """(number of the document, number of the piece in it)."""
    split: Split
    text: str
    is_last: bool

    @property
    def is_first(self) -> bool:
        """Whether its document begins with it."""
        return self.position[1] == 0


def pieces_of(items: Iterable[Item], *, whole: bool = False) -> Iterator[Piece]:
    """All pieces of all documents, in order; `whole` documents for a vocabulary whose ids a cut would change."""
    number = 0
    for item in items:
        if isinstance(item, Skipped):
            continue
        split, document = item
        texts = [document.text] if whole else list(cut(document.text, PIECE))
        for i, text in enumerate(texts):
            yield Piece((number, i), split, text, i == len(texts) - 1)
        number += 1
