"""Texts that llama.cpp gives other ids than the tokenizer of which a GGUF file was made: a line for each cause."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from jaxgpt.errors import first
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies.bpe import ByteLevelEncoder
from jaxgpt.vocabularies.split_rules import RULES

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers whose work may be done before llama.cpp sees the text, with the same ids."""
PROBES = ("Hello", "e\u0301", "\u00e9", "\ufb01", " a", "a ", "a b", "a  b", "a\tb", "a\x01b", "\u200b", "\u4e2d")
"""Case, an accent apart and composed, a compatibility form, spaces at both ends and within, what cleaning removes."""


def notices(tokenizer: Tokenizer) -> list[str]:
    """What this tokenizer does to text and llama.cpp does otherwise."""
    encoder = tokenizer.encoder
    found: list[str] = []
    content = json.loads(encoder.json()) if isinstance(encoder, ByteLevelEncoder) else {}
    found += _of_normalizer(tokenizer, _steps(content.get("normalizer")))
    if encoder.edges:
        found.append(f"llama.cpp does not look at what stands beside {first(sorted(encoder.edges))}: lstrip and so on")
    if content and tokenizer.merges:
        whole = bool(content["model"].get("ignore_merges"))
        if whole != RULES[tokenizer.pre_tokenizer].ignore_merges:
            both = ("merges it", "takes it whole")
            found.append(
                f"a word that is a token: this tokenizer {both[whole]}, llama.cpp {both[not whole]} (ignore_merges)"
            )
    for pair in _taken_otherwise(tokenizer):
        tokens, text = first([*pair[:2]]), first([pair[2]])
        found.append(f"where tokens overlap ({tokens} in {text}) llama.cpp may take another one than this tokenizer")
        break
    return found


# -- Normalizers -----------------------------------------------------------------------


def _steps(normalizer: Any) -> list[Mapping[str, Any]]:
    """A section `normalizer` with its sequences opened."""
    if not normalizer:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for part in normalizer["normalizers"] for step in _steps(part)]


def _of_normalizer(tokenizer: Tokenizer, steps: list[Mapping[str, Any]]) -> list[str]:
    """llama.cpp normalises nothing."""
    names = list(dict.fromkeys(step["type"] for step in steps))
    # A vocabulary of bytes may put a space before every text, which is no step of the normalizer.
    if tokenizer.normalise("a") == " a" and "Prepend" not in names:
        names.append("add_prefix_space")
    if not names:
        return []
    if len(names) == 1 and names[0] in FORMS:
        return [f"llama.cpp does not normalise text as this tokenizer does: give it text in {names[0]}"]
    patterns = [step.get("pattern") or {} for step in steps]
    replaced = [f"a{pattern['String']}b" for pattern in patterns if "String" in pattern]
    probes = (text for text in (*replaced, *PROBES) if tokenizer.normalise(text) != text)
    # llama.cpp's ids stand for the text as it is: ids of another text are others.
    example = next((text for text in probes if tokenizer.decode(tokenizer.encode(text)) != text), None)
    shown = "some texts may get" if example is None else f"{example!a} gets"
    return [f"llama.cpp does not normalise text as this tokenizer does ({first(names)}): {shown} other ids"]


# -- Tokens that overlap ---------------------------------------------------------------


def _taken_otherwise(tokenizer: Tokenizer) -> Iterator[tuple[str, str, str]]:
    """Pairs of tokens, and a text in which both stand, overlapping, where another one may win in llama.cpp.

    This tokenizer takes the leftmost, then the longest, but those that are looked for in
    normalised text after all others; llama.cpp takes the longest (in bytes) of the whole
    text first. In text without specials, their strings hide what begins within them from
    this tokenizer, and hide nothing from llama.cpp.
    """
    specials = {special.text for special in tokenizer.specials}
    late = tokenizer.encoder.found_late
    for before, after, text in _overlaps({*specials, *tokenizer.added}):
        rounds = [token in late and token not in specials for token in (before, after)]
        taken, left = (after, before) if rounds[0] > rounds[1] else (before, after)
        hidden = before in specials and after not in specials and (before in late) == (after in late)
        if hidden or len(left.encode()) >= len(taken.encode()):
            yield before, after, text


def _overlaps(tokens: set[str]) -> Iterator[tuple[str, str, str]]:
    """Every two tokens that overlap in some text, with it: the one that begins first, or is longer, first."""
    ordered = sorted(tokens)
    begins = {token[0] for token in tokens}
    lengths = sorted({len(token) for token in tokens})
    for token in ordered:
        for at in (at for at, character in enumerate(token) if character in begins):
            within = (token[at : at + length] for length in lengths if at + length <= len(token))
            yield from ((token, inner, token) for inner in within if inner in tokens and inner != token)
            rest = token[at:]
            # Tokens that begin with the rest stand together in the order of strings.
            for place in range(bisect_left(ordered, rest), len(ordered) if at else 0):
                if not ordered[place].startswith(rest):
                    break
                if ordered[place] not in (rest, token):
                    yield token, ordered[place], token[:at] + ordered[place]
