"""Repairs of text that was changed before it was encoded, or after it was decoded.

Each is a mistake that can be computed: wherever the candidate answers exactly as the
reference does with the mistake, the mistake is undone.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from oracle import text_probe
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.text.vocabulary import claim, mistaken
from oracle.rungs import ids
from oracle.site import Site
from oracle.text_reference import TextReference

Change = Callable[[str], str]
Decode = Callable[[Sequence[int]], str]

CASE: Mapping[str, Change] = {"lower case": str.lower, "folded case": str.casefold, "upper case": str.upper}
FORMS: Mapping[str, Change] = {form: partial(unicodedata.normalize, form) for form in ("NFC", "NFD", "NFKC", "NFKD")}
STRIPPED: Mapping[str, Change] = {
    "spaces stripped": str.strip,
    "spaces stripped on the left": str.lstrip,
    "spaces stripped on the right": str.rstrip,
    "runs of white space made one space": lambda text: " ".join(text.split()),
}
SPACE: Mapping[str, Change] = {
    "a space put first": lambda text: " " + text,
    "a space put first unless there is one": lambda text: text if text[:1] == " " else " " + text,
    "a space put before all but an empty text": lambda text: " " + text if text else text,
    "a space put before what begins with none": lambda text: text if not text or text[0].isspace() else " " + text,
}
LINES: Mapping[str, Change] = {
    "\\r\\n made \\n": lambda text: text.replace("\r\n", "\n"),
    "\\r\\n and \\r made \\n": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "\\n made \\r\\n": lambda text: text.replace("\n", "\r\n"),
    "lines split and joined again": lambda text: "\n".join(text.splitlines()),
}


def changed_first(changes: Mapping[str, Change]) -> Callable[[Site], Iterator[Variant]]:
    """Undone wherever the ids are those of the changed text."""

    def variants(site: Site) -> Iterator[Variant]:
        at = claim(site, ids.ENCODE)
        if at is None:
            return
        right = at.walk.reference.encode
        for name, change in changes.items():
            yield from mistaken(at, f"without {name}", lambda text, change=change: right(change(text)))

    return variants


def dropped(site: Site) -> Iterator[Variant]:
    """Undone wherever the ids are those of the text without the characters that alone have no ids."""
    at = claim(site, ids.ENCODE)
    if at is None:
        return
    encode, right = at.text.encode, at.walk.reference.encode
    known = sorted({character for text in text_probe.texts(at.comparison.seed) for character in text})
    lost = {ord(character): None for character in known if not encode(character)}
    if lost:
        change = f"with {len(lost)} kinds of characters not dropped, such as {ids.quoted(chr(next(iter(lost))))}"
        yield from mistaken(at, change, lambda text: right(text.translate(lost)))


def fewer_merges(site: Site) -> Iterator[Variant]:
    """Undone wherever the ids are those of the vocabulary with the first merges only, or with none."""
    at = claim(site, ids.ENCODE)
    if at is None or not at.walk.reference.merges or at.walk.reference.pieces is None:
        return
    reference = at.walk.reference
    rank = {reference.vocabulary.get(a + b): number for number, (a, b) in enumerate(reference.merges)}
    texts = text_probe.texts(at.comparison.seed)
    used = max((rank.get(id, -1) for text in texts for id in at.text.encode(text)), default=-1) + 1
    for count in sorted({used, 0}, reverse=True):
        if count < len(reference.merges):
            change = f"with more than the first {count:,} merges"
            yield from mistaken(at, change, _with_merges(reference, count))


def _with_merges(reference: TextReference, count: int) -> Callable[[str], list[int]]:
    from tokenizers import models, pre_tokenizers

    bpe = models.BPE(dict(reference.vocabulary), [*reference.merges[:count]])
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = reference.pieces
    assert pieces is not None

    def encode(text: str) -> list[int]:
        spelled = (part for piece in pieces(text) for part, _ in spell.pre_tokenize_str(piece))
        return [token.id for part in spelled for token in bpe.tokenize(part)]

    return encode


# -- After decoding --------------------------------------------------------------------


def decoded_apart(site: Site) -> Iterator[Variant]:
    """Undone wherever the text is that of the ids decoded one by one."""
    right = _right(site)
    if right is not None:
        yield from _decoding(site, "with all ids decoded together", lambda given: "".join(right([id]) for id in given))


def changed_last(site: Site) -> Iterator[Variant]:
    """Undone wherever the decoded text lacks spaces."""
    right = _right(site)
    changes: Mapping[str, Change] = {
        "a first space removed": lambda text: text.removeprefix(" "),
        **STRIPPED,
        "spaces before signs removed": _cleaned,
    }
    if right is None:
        return
    for name, change in changes.items():
        yield from _decoding(site, f"without {name}", lambda given, change=change: change(right(given)))


def _cleaned(text: str) -> str:
    """As `clean_up_tokenization_spaces` of transformers does."""
    for sign in (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(sign, sign[1:])
    return text.replace(" ' ", "'")


def spelled_names(site: Site) -> Iterator[Variant]:
    """Undone wherever the text is that of the tokens' names in the vocabulary."""
    at = claim(site, ids.DECODE)
    if at is not None:
        token = at.walk.reference.token
        yield from _decoding(
            site, "with the names of tokens turned into bytes", lambda given: "".join(token(id) or "" for id in given)
        )


def _right(site: Site) -> Decode | None:
    at = claim(site, ids.DECODE)
    return None if at is None else at.walk.reference.decode


def _decoding(site: Site, change: str, wrong: Decode) -> Iterator[Variant]:
    at = claim(site, ids.DECODE)
    assert at is not None
    given, right = at.text.decode, at.walk.reference.decode

    def undone(of: Sequence[int]) -> str:
        text = given(of)
        return right(of) if text == wrong(of) else text

    yield Variant(change, at.changed(decode=undone))


_RUNGS = (ids.NAME,)
_AS_IT_IS = "encode the text as it is: byte-level vocabularies have no normaliser (jaxgpt/tokenizer.py, encode)"

REPAIRS: tuple[Repair, ...] = (
    Repair("case of the text changed", _AS_IT_IS, _RUNGS, changed_first(CASE)),
    Repair("text normalised", _AS_IT_IS, _RUNGS, changed_first(FORMS)),
    Repair("text stripped", _AS_IT_IS, _RUNGS, changed_first(STRIPPED)),
    Repair("space put before the text", _AS_IT_IS, _RUNGS, changed_first(SPACE)),
    Repair("line ends converted", _AS_IT_IS, _RUNGS, changed_first(LINES)),
    Repair("characters dropped", _AS_IT_IS, _RUNGS, dropped),
    Repair("merges missing", "read every line of merges.txt (jaxgpt/vocabulary.py)", _RUNGS, fewer_merges),
    Repair(
        "ids decoded one by one",
        "join the bytes of all tokens before decoding UTF-8 (jaxgpt/tokenizer.py, decode)",
        _RUNGS,
        decoded_apart,
    ),
    Repair(
        "decoded text changed", "return the decoded text as it is (jaxgpt/tokenizer.py, decode)", _RUNGS, changed_last
    ),
    Repair(
        "hex vs byte-level vocabulary",
        "spell the names of tokens as bytes by the byte-level alphabet (jaxgpt/vocabulary.py)",
        _RUNGS,
        spelled_names,
    ),
)
