"""Other ways of cutting a text before BPE, and of spelling its bytes: what a wrong tokenizer is likely to do.

Sources: tiktoken's `openai_public.py` (cl100k, o200k), Qwen2's and Llama 3's
`tokenizer.json`, ggml-org/llama.cpp #6920 for what comes of mixing them up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oracle.text_reference import TextReference

Encode = Callable[[str], list[int]]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_AFTER_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "that of GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "that of GPT-2 without its look-ahead": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
    "that of GPT-2 with contractions of any case": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+"
    r"|\s+(?!\S)|\s+",
    "that of GPT-2 with every digit apart": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "that of GPT-2 without the space before words": r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+",
    "that of cl100k and Llama 3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_AFTER_WORDS}",
    "that of Qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_AFTER_WORDS}",
    "that of o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_AFTER_WORDS}",
    "words and spaces": r"\S+|\s+",
    "words with the space before them": r" ?\S+|\s+",
    "letters, digits and signs": r"\w+|[^\w\s]+|\s+",
}


def others(reference: TextReference) -> Iterator[tuple[str, Encode]]:
    """The reference's vocabulary behind other pre-tokenizers."""
    from tokenizers import Regex, pre_tokenizers

    bpe = _bpe(reference)

    def behind(cut: Any) -> Encode:
        return lambda text: [token.id for piece, _ in cut.pre_tokenize_str(text) for token in bpe.tokenize(piece)]

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, pattern in PATTERNS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        yield name, behind(pre_tokenizers.Sequence([split, byte_level]))
    yield "none", behind(byte_level)
    yield "that of GPT-2 with a space put first", behind(pre_tokenizers.ByteLevel(add_prefix_space=True))


def spellings(reference: TextReference, encode: Encode) -> Iterator[tuple[str, Encode]]:
    """The reference's vocabulary read as one of another kind; what it lacks is what `encode` makes of such."""
    bpe, vocabulary, pieces = _bpe(reference), reference.vocabulary, reference.pieces
    lacking = [chr(byte) for byte in range(1, 128) if f"{byte:02x}" not in vocabulary]
    no_byte, no_character = _only(encode, lacking), _only(encode, ["\n", "中", "字"])

    def raw(text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text) if pieces else [text]:
            for part in _known(piece, vocabulary):
                ids += [token.id for token in bpe.tokenize(part)] if part[0] in vocabulary else no_character
        return ids

    def as_hex(text: str) -> list[int]:
        found = (vocabulary.get(f"{byte:02x}") for byte in text.encode())
        return [id for given in found for id in (no_byte if given is None else [given])]

    byte_of = {vocabulary[name]: byte for name, byte in _alphabet().items() if name in vocabulary}

    def by_value(text: str) -> list[int]:
        found = pieces(text) if pieces else [text]
        return [byte_of.get(token.id, int(token.id)) for piece in found for token in bpe.tokenize(_spelled(piece))]

    yield "its bytes numbered by their values", by_value
    yield "its byte-level names taken for plain characters", raw
    yield "its bytes looked up as two hexadecimal digits", as_hex


def _alphabet() -> dict[str, int]:
    """GPT-2's names of bytes: printable ones stand for themselves, the others for code points from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _spelled(piece: str) -> str:
    name_of = {byte: name for name, byte in _alphabet().items()}
    return "".join(name_of[byte] for byte in piece.encode())


def _only(encode: Encode, unknown: Sequence[str]) -> list[int]:
    """The one id that stands for all of these, or none."""
    found = {id for character in unknown for id in encode(character)}
    return list(found) if len(found) == 1 else []


def _known(piece: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The piece cut into runs of characters that the vocabulary has, and single ones that it lacks."""
    parts: list[str] = []
    for character in piece:
        if parts and character in vocabulary and parts[-1][-1] in vocabulary:
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def _bpe(reference: TextReference) -> Any:
    from tokenizers import models

    return models.BPE(dict(reference.vocabulary), [*reference.merges])
