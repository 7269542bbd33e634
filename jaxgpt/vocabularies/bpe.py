"""Byte-level BPE of other programs, through the tokenizers package: kinds `hf`, `bpe` and `hex`.

What the files say is in the state word for word, so that an export can write it back;
the package reads it once. Special tokens are never found in text, whatever was typed:
`encode_special_tokens` makes ordinary text of them. Other added tokens are content.
"""

import array
import functools
import json
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError, first
from jaxgpt.vocabularies import split_rules
from jaxgpt.vocabularies.byte_alphabet import CHARACTERS, spelled, unspelled
from jaxgpt.vocabularies.kinds import SPACES, Edges, Encoder, Merges, exact_keys, read_merges
from jaxgpt.vocabularies.text_cuts import cut

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

MAX_IDS = 1 << 22
"""A vocabulary with a higher id is refused: a table of its tokens would be memory for nothing."""
MAX_RUN = 5_000_000
"""Longest run of white space in a text; the regex engine gives up on about twice that, and says so on stderr."""
SLICE = 4000
"""Characters after which a text is cut for the package, whose working memory then fits the processor's cache."""
CACHED_WORDS = 100_000
"""Words whose ids the package remembers; its own 10,000 are fewer than a corpus uses again and again."""
UNKNOWN = "<unk>"
"""What stands for a byte that a vocabulary lacks, where it names nothing itself."""
HEX_NAMES = [f"{byte:02x}" for byte in range(256)]
"""Names of the byte tokens of kind `hex`."""
_HEX = re.compile(r"([0-9a-f]{2})+")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class ByteLevelEncoder(Encoder):
    """What the three kinds share: a tokenizer of the package, and the sections that made it."""

    batch_characters = 2**20
    """Many, because the package has threads of its own, which wait for each other at the end of every batch."""

    def __init__(self, library: "tokenizers.Tokenizer", data: Mapping[str, Any]) -> None:
        """Takes the tokenizer over. Raises InputError for ids that collide or are absurdly high."""
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        with readable("the added tokens"):
            library.add_tokens([added_token(note) for note in data["added"]])
        self._library = library
        self._data = data
        self._ids = library.get_vocab()
        self.size = max(self._ids.values(), default=-1) + 1
        refuse_bad_ids(self._ids)
        noted = library.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in noted.items() if token.special}
        self.added = {token.content: id for id, token in noted.items() if not token.special}
        asked = {token.content: Edges(token.lstrip, token.rstrip, token.single_word) for token in noted.values()}
        self.edges = {text: edges for text, edges in asked.items() if edges != Edges()}
        self.found_late = {token.content for token in noted.values() if token.normalized}
        self.missing_bytes = sum(character not in self._ids for character in CHARACTERS)
        unknown = self._ids.get(library.model.unk_token or "")
        self.unknown_ids = [] if unknown is None else [unknown]
        self.unknown_cause = f"its vocabulary lacks {self.missing_bytes} of the 256 byte tokens"
        self.bos_ids = self._front()

    def _front(self) -> tuple[int, ...]:
        """Ids that the post-processor puts before every text."""
        if self._library.post_processor is None:
            return ()
        alone, framed = (self._library.encode("a", add_special_tokens=framed).ids for framed in (False, True))
        return tuple(framed[: framed.index(alone[0])]) if alone and alone[0] in framed else ()

    def encode_ordinary(self, text: str) -> list[int]:
        """See `Encoder`; InputError where the package's regex engine gives up."""
        return self._encoded([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """See `Encoder`; on the package's own threads."""
        import numpy as np

        def uint32(ids: list[int]) -> np.ndarray:
            return np.frombuffer(array.array("I", ids), np.uint32)  # half the time of `np.asarray`

        plain = self._for_ascii
        slices = [list(cut(text, SLICE)) if self.cuts_before_spaces else [text] for text in texts]
        flat = [slice for several in slices for slice in several]
        ascii = iter(self._encoded([slice for slice in flat if slice.isascii()], plain))
        other = iter(self._encoded([slice for slice in flat if not slice.isascii()]))
        ids = (uint32(next(ascii if slice.isascii() else other)) for slice in flat)
        return [np.concatenate([next(ids) for _ in several]) for several in slices]

    def _encoded(self, texts: Sequence[str], library: "tokenizers.Tokenizer | None" = None) -> list[list[int]]:
        for text in texts:
            if len(text) > MAX_RUN:
                _refuse_long_runs(text)
        with readable("the text", "cannot be encoded"):
            library = library or self._library
            return [found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def _for_ascii(self) -> "tokenizers.Tokenizer":
        """For many texts: a larger cache, and no NFC, a sixth of the time, where a text is its own normal form."""
        import tokenizers

        library = self._library
        library.model._resize_cache(CACHED_WORDS)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        if (section(library.normalizer) or {}).get("type") != "NFC":
            return library
        noted = library.get_added_tokens_decoder()
        plain = tokenizers.Tokenizer(library.model)
        plain.pre_tokenizer = library.pre_tokenizer
        plain.encode_special_tokens = True
        plain.add_tokens([noted[id] for id in sorted(noted)])
        same = {id: token.content for id, token in plain.get_added_tokens_decoder().items()}
        return plain if same == {id: token.content for id, token in noted.items()} else library

    @property
    def cuts_before_spaces(self) -> bool:
        """So it is under the known rules, unless a normalizer or a token reaches over the cut."""
        normalizer = section(self._library.normalizer)
        within = normalizer is None or normalizer.get("type") == "NFC"
        reaching = self.edges or any(set(text) & set(SPACES) for text in self.added)
        return bool(self.pre_tokenizer) and within and not reaching

    def token_bytes(self) -> list[bytes]:
        """See `Encoder`; a token that is not spelled in the byte alphabet is its own text."""
        table = [b""] * self.size
        literal = {**self.specials, **self.added}
        for token, id in self._ids.items():
            table[id] = token.encode() if token in literal else unspelled(token) or self._literal(token)
        return table

    @staticmethod
    def _literal(token: str) -> bytes:
        """A token with characters outside the byte alphabet."""
        return token.encode()

    def normalise(self, text: str) -> str:
        """What the normalizer makes of a text, and the space that some vocabularies put before it."""
        normalizer = self._library.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        if not self.prefixes_space:
            return text
        pieces = self._library.pre_tokenizer.pre_tokenize_str(text)
        return b"".join(unspelled(piece) or b"" for piece, _ in pieces).decode()

    @property
    def prefixes_space(self) -> bool:
        """Whether a space is put before what does not begin with one."""
        steps = split_rules.flat(section(self._library.pre_tokenizer))
        return any(step.get("type") == "ByteLevel" and step.get("add_prefix_space", True) for step in steps)

    def with_content(self, texts: Collection[str]) -> "Encoder":
        """See `Encoder`; changes what the files say of these tokens."""
        if not texts:
            return self

        def changed(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**note, "special": False} if note["content"] in texts else note for note in notes]

        data: dict[str, Any] = {**self._data, "added": changed(self._data["added"])}
        if "tokenizer.json" in data:
            content = json.loads(data["tokenizer.json"])
            content["added_tokens"] = changed(content.get("added_tokens") or [])
            data["tokenizer.json"] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        return self.restore(data)

    def not_honoured(self) -> list[str]:
        """In a line at most, special tokens that the package looks for in normalised text, and jaxgpt in the text."""
        normalizer = section(self._library.normalizer)
        if normalizer is None:
            return []
        # NFC changes nothing of ASCII.
        harmless = normalizer.get("type") == "NFC"
        late = [text for text in self.specials if text in self.found_late and not (harmless and text.isascii())]
        found = f"{first(late)}: tokenizer.json has special tokens found in normalised text; a chat template of jaxgpt"
        return [f"{found} finds them only as they are spelled"] if late else []

    def data(self) -> dict[str, Any]:
        """See `Encoder`: the files' text."""
        return dict(self._data)

    def json(self) -> str:
        """A `tokenizer.json` of the vocabulary; the one it was read from, where it was."""
        return self._library.to_str(pretty=True)


class HfEncoder(ByteLevelEncoder):
    """A `tokenizer.json`."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """`data` as `restore` takes it."""
        import tokenizers

        with readable("tokenizer.json"):
            library = tokenizers.Tokenizer.from_str(data["tokenizer.json"])
        super().__init__(library, data)
        self.pre_tokenizer = split_rules.rule_named(section(library.pre_tokenizer))

    def json(self) -> str:
        """The file as it was."""
        return self._data["tokenizer.json"]

    @property
    def merges(self) -> Merges:
        """See `Encoder`; parses the file again, for the few who ask."""
        pairs = json.loads(self._data["tokenizer.json"])["model"]["merges"]
        return read_merges("\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs))

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> "HfEncoder":
        """See `Encoder`."""
        exact_keys("tokenizer data of kind hf", data, {"tokenizer.json", "added"})
        _refuse_other_types("hf", data, ("tokenizer.json",))
        return cls(data)


class BpeEncoder(ByteLevelEncoder):
    """`vocab.json` and `merges.txt`, spelled in the byte alphabet, under one of `split_rules.RULES`."""

    kind = "bpe"

    def __init__(self, data: Mapping[str, Any]) -> None:
        """`data` as `restore` takes it."""
        ids, self._merges = self._spelled(data)
        # With an id of its own in the vocabulary, the package does not number an added token.
        noted = {note["content"]: note.get("id") for note in data["added"]}
        ids |= noted
        refuse_bad_ids(ids)
        self.pre_tokenizer = data["rule"]
        super().__init__(_library(ids, self._merges, split_rules.RULES[data["rule"]]), data)

    def _spelled(self, data: Mapping[str, Any]) -> tuple[dict[str, int], Merges]:
        """Ids by token and merges, in the byte alphabet."""
        return read_vocabulary(data["vocab.json"]), read_merges(data["merges.txt"])

    @property
    def merges(self) -> Merges:
        """See `Encoder`."""
        return self._merges

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> "BpeEncoder":
        """See `Encoder`."""
        exact_keys(f"tokenizer data of kind {cls.kind}", data, {"vocab.json", "merges.txt", "rule", "added"})
        _refuse_other_types(cls.kind, data, ("vocab.json", "merges.txt"))
        if data["rule"] not in split_rules.RULES:
            raise InputError(f"tokenizer data: rule {data['rule']!r} is none of {', '.join(split_rules.RULES)}")
        return cls(data)


class HexEncoder(BpeEncoder):
    """The same two files with every token, of bytes or merged, named by its bytes in hex: `00`…`ff`, `2074`."""

    kind = "hex"

    def __init__(self, data: Mapping[str, Any]) -> None:
        """`data` as `restore` takes it."""
        super().__init__(data)
        if self.missing_bytes:
            self.unknown_cause = (
                f"the vocabulary names {256 - self.missing_bytes} of the 256 bytes `00`…`ff`, "
                "so it is byte-level BPE read as hex: drop --tokenizer-kind hex"
            )

    def _spelled(self, data: Mapping[str, Any]) -> tuple[dict[str, int], Merges]:
        # What is no hex (special tokens) has no bytes; a zero, which no spelling has, keeps it apart from those.
        whole = {note["content"] for note in data["added"]}
        ids = read_vocabulary(data["vocab.json"])
        named = {
            spelled(bytes.fromhex(name)) if _HEX.fullmatch(name) else name if name in whole else f"\0{name}": id
            for name, id in ids.items()
        }
        pairs = [line.split(" ") for line in data["merges.txt"].splitlines()]
        return named, tuple(
            (bytes.fromhex(pair[0]), bytes.fromhex(pair[1]))
            for pair in pairs
            if len(pair) == 2 and all(map(_HEX.fullmatch, pair))
        )

    @staticmethod
    def _literal(token: str) -> bytes:
        return token.removeprefix("\0").encode()


def _library(ids: dict[str, int], merges: Merges, rule: split_rules.Rule) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import models

    unknown = None
    if any(character not in ids for character in CHARACTERS):
        unknown = UNKNOWN
        ids = {**ids, UNKNOWN: ids.get(UNKNOWN, max(ids.values(), default=-1) + 1)}
    sections = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.pre_tokenizer,
        "decoder": split_rules.byte_level(use_regex=True),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    library = tokenizers.Tokenizer.from_str(json.dumps(sections))
    pairs = [(spelled(left), spelled(right)) for left, right in merges]
    with readable("merges.txt"):
        library.model = models.BPE(ids, pairs, unk_token=unknown, ignore_merges=rule.ignore_merges)
    return library


# -- What files may hold ---------------------------------------------------------------


def read_vocabulary(text: str) -> dict[str, int]:
    """A `vocab.json`: ids by token; raises InputError for anything else."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("vocab.json is not readable JSON") from None
    if not isinstance(ids, dict) or not ids:
        raise InputError("vocab.json is not an object from tokens to ids")
    refuse_bad_ids(ids)
    return ids


def added_token(note: Any) -> Any:
    """An added token of the package, from what tokenizer.json or tokenizer_config.json notes of it."""
    from tokenizers import AddedToken

    content = note.get("content") if isinstance(note, Mapping) else None
    flags = {flag: note.get(flag, False) for flag in _FLAGS} if isinstance(note, Mapping) else {}
    if not isinstance(content, str) or not content or any(not isinstance(value, bool) for value in flags.values()):
        raise InputError(f"an added token is {str(note)[:60]!r}, expected an object with its content and flags")
    return AddedToken(content, **flags)


def section(part: Any) -> Any:
    """A component of the package as its section of tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def refuse_bad_ids(ids: Mapping[str, Any]) -> None:
    """Raise InputError unless every token has an id of its own, none absurdly high."""
    if any(type(id) is not int or not 0 <= id < MAX_IDS for id in ids.values()):
        token, id = next((t, i) for t, i in ids.items() if type(i) is not int or not 0 <= i < MAX_IDS)
        raise InputError(f"token {token[:40]!r} has id {str(id)[:20]}; expected an integer from 0 to {MAX_IDS - 1:,}")
    if len(set(ids.values())) < len(ids):
        of: dict[int, str] = {}
        token, other = next((t, of[i]) for t, i in ids.items() if of.setdefault(i, t) != t)
        raise InputError(f"{token[:40]} has id {ids[token]}, already {other[:40]!r}")


def _refuse_other_types(kind: str, data: Mapping[str, Any], texts: Sequence[str]) -> None:
    wrong = [name for name in texts if not isinstance(data[name], str)]
    added = data["added"] if isinstance(data["added"], list) else [None]
    wrong += [] if all(isinstance(note, dict) and isinstance(note.get("content"), str) for note in added) else ["added"]
    if wrong:
        raise InputError(f"tokenizer data of kind {kind}: {first(wrong)} not as jaxgpt writes it")


def _refuse_long_runs(text: str) -> None:
    """A run of MAX_RUN characters covers one block of half of them."""
    block = MAX_RUN // 2
    for begin in range(0, len(text) - block + 1, block):
        if text[begin : begin + block].isspace():
            raise InputError(f"the text has {block:,} or more white space characters in a row; cut it")


@contextmanager
def readable(what: str, problem: str = "cannot be read by tokenizers") -> Generator[None, None, None]:
    """What the package says of input it cannot take, a panic of its Rust code included, as one InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        # A panic is no Exception, a key press is none either.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{what} {problem}: {reason[:200]}") from None


def names_of(ids: Iterable[str]) -> tuple[int, int]:
    """How many of the 256 hex names, and how many of the 256 characters of the byte alphabet, are tokens."""
    tokens = set(ids)
    return len(tokens.intersection(HEX_NAMES)), len(tokens.intersection(CHARACTERS))
