"""Special and added tokens: what code calls them, and what a set of them must hold.

A special token is control: only a template emits it. An added token is content: it is
one id wherever it occurs in text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.errors import InputError, first
from jaxgpt.vocabularies import kinds
from jaxgpt.vocabularies.kinds import Encoder, refuse_invalid_unicode

END_OF_TEXT = "end_of_text"
PAD = "pad"
END = "end"
"""Name of the special token that ends a turn, in templates that have one."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
ALWAYS = {END_OF_TEXT: kinds.END_OF_TEXT, PAD: "<|pad|>"}
"""Special tokens of every tokenizer, name to string; `pad` only where the embedding has a row for it."""


@dataclass(frozen=True)
class Special:
    """A special token: what code calls it, what decoding prints, and its id."""

    name: str
    text: str
    id: int


# -- Saved -----------------------------------------------------------------------------


def saved_specials(state: Mapping[str, Any]) -> list[Special]:
    """Those of a tokenizer's state; raises InputError where its list and maps disagree."""
    texts, ids, names = state["special_tokens"], state["special_token_ids"], state["special_name_ids"]
    if not (isinstance(texts, list) and isinstance(ids, dict) and isinstance(names, dict)):
        raise InputError("tokenizer state must hold special tokens as one list and two objects")
    if any(not isinstance(text, str) for text in texts):
        raise InputError("special tokens must be strings")
    if not len(texts) == len(ids) == len(names):
        raise InputError(f"{len(texts)} special tokens, but {len(ids)} ids by string and {len(names)} ids by name")
    if any(type(id) is not int for id in [*ids.values(), *names.values()]):
        raise InputError("ids of special tokens must be integers")
    without_id = [repr(text) for text in texts if text not in ids]
    if without_id:
        raise InputError(f"special tokens without an id: {first(without_id)}")
    if sorted(ids.values()) != sorted(names.values()):
        raise InputError("ids by string and ids by name differ")
    # Two strings with one id both reach the check of unique ids.
    name_of = {id: name for name, id in names.items()}
    return [Special(name_of[id], text, id) for text, id in ids.items()]


def saved_added(state: Mapping[str, Any]) -> dict[str, int]:
    """Added tokens of a tokenizer's state, string to id; raises InputError for what jaxgpt does not write."""
    added, files = state["added_token_ids"], state["files"]
    if not isinstance(added, dict) or any(type(id) is not int for id in added.values()):
        raise InputError("added tokens must be one object from strings to integer ids")
    if not isinstance(files, dict) or any(not isinstance(text, str) for text in files.values()):
        raise InputError("files must be one object from names to texts")
    return added


# -- Checked ---------------------------------------------------------------------------


def check_specials(specials: Sequence[Special], encoder: Encoder, rows: int) -> None:
    """Raise InputError unless ids and strings are unique, and each id free for it.

    A base vocabulary's own special tokens keep their ids; all others lie in
    [base_vocab_size, rows).
    """
    by_id: dict[int, Special] = {}
    by_text: dict[str, Special] = {}
    for special in specials:
        refuse_invalid_unicode(special.text)
        if not special.text:
            raise InputError(f"special token {special.name} is an empty string; give it one")
        same_id, same_text = by_id.setdefault(special.id, special), by_text.setdefault(special.text, special)
        if same_id is not special:
            raise InputError(f"{special.text} has id {special.id}, already {same_id.text!r}")
        if same_text is not special:
            raise InputError(f"special tokens {same_text.name} and {special.name} are both {special.text}; change one")
        _check_place(special, encoder, rows)
    if END_OF_TEXT not in {special.name for special in specials}:
        raise InputError(f"no special token is named {END_OF_TEXT}")


def check_added(added: Mapping[str, int], specials: Sequence[Special], encoder: Encoder, rows: int) -> None:
    """Raise InputError unless every added token has a string and an id of its own."""
    texts = {**encoder.added, **{special.text: special.id for special in specials}}
    taken = {special.id: special.text for special in specials}
    for text, id in added.items():
        refuse_invalid_unicode(text)
        if not text:
            raise InputError("an added token is an empty string; give it one")
        if text in texts:
            raise InputError(f"added token {text} is token {texts[text]} already; leave it out")
        if id in taken:
            raise InputError(f"{text} has id {id}, already {taken[id]!r}")
        taken[id] = text
        _check_place(Special(text, text, id), encoder, rows)


def check_found(added: Iterable[str], specials: Sequence[Special], kind: str) -> None:
    """Raise InputError for an added token that other programs would read as more, or as something else, than a token.

    Args:
        added: strings of tokens that jaxgpt adds.
        specials: the tokenizer's.
        kind: a key of KINDS.
    """
    within = re.compile("|".join(re.escape(special.text) for special in specials))
    for text in added:
        if found := within.search(text):
            raise InputError(
                f"added token {text} contains the special token {found[0]}, which transformers would not find there: "
                "a turn or a text would not end; use another string"
            )
        if kind == "char" and _BYTE.fullmatch(text):
            raise InputError(
                f"added token {text} is how a vocabulary of characters names a byte in other programs; "
                "use another string"
            )


def _check_place(special: Special, encoder: Encoder, rows: int) -> None:
    own = encoder.specials.get(special.text)
    if own == special.id:
        return
    if own is not None:
        raise InputError(f"{special.text} has id {special.id}, but {own} in the base vocabulary")
    if 0 <= special.id < encoder.size:
        token = encoder.token_bytes()[special.id].decode(errors="replace")
        raise InputError(f"{special.text} has id {special.id}, already {token!r}")
    if not encoder.size <= special.id < rows:
        raise InputError(f"{special.text} has id {special.id}, outside the added ids {encoder.size} to {rows - 1}")
