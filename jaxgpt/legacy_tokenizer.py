"""Tokenizer states of older programs: what they lack is derived where that is certain, else guessed and said.

Older states list their special tokens without saying which ids these have, and their
ids came from the code of that day: the next ones after the base vocabulary, in the
order of the list. A guess is right only if nothing was reordered since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.chat import Template
from jaxgpt.errors import InputError
from jaxgpt.special_tokens import ALWAYS, END_OF_TEXT
from jaxgpt.tokenizer import STATE_VERSION
from jaxgpt.vocabularies.kinds import Encoder, kind_named


@dataclass(frozen=True)
class Change:
    """One line of what a repair does."""

    what: str
    """A token's string, or a key of the state."""
    id: int | None
    before: str
    after: str
    guessed: bool = False
    """Nothing in the checkpoint says that it is so."""


def completed(
    state: Mapping[str, Any], rows: int, template: Template | None, eos_token_ids: Sequence[int]
) -> tuple[dict[str, Any], list[Change]]:
    """A state with every key that today's has, and what was changed; the same state where it lacks nothing.

    Args:
        state: as saved; one of a version that is not known yet is returned as it is.
        rows: of the model's embedding.
        template: the checkpoint's, whose special tokens have names.
        eos_token_ids: ids that end a text, as the model says, which a guess must not contradict.

    Raises:
        InputError: neither strings nor ids of special tokens, ids that contradict each
            other, or an unknown kind of tokenizer.
    """
    version = state.get("version")
    if version not in (None, 1, STATE_VERSION):
        return dict(state), []
    encoder = kind_named(state.get("kind")).restore(state.get("data", {}))
    known = {**ALWAYS, **(template.specials if template else {})}
    names = _names(state, known)
    names, ids, guessed = _ids(state, names, encoder)
    _refuse_contradicted(names, ids, guessed, eos_token_ids, encoder)
    defaults = {"added_token_ids": {}, "files": {}, "data": {}}
    sizes = {"base_vocab_size": encoder.size, "model_vocab_size": rows}
    found = {**defaults, **sizes, **state, "version": STATE_VERSION}
    if not (isinstance(state.get("special_tokens"), list) and all(isinstance(state.get(key), dict) for key in _MAPS)):
        found["special_tokens"] = list(names)
        found["special_token_ids"] = ids
        found["special_name_ids"] = {name: ids[text] for text, name in names.items()}
    return found, _changes(state, found, names, guessed)


_MAPS = ("special_token_ids", "special_name_ids")


def _names(state: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Name of each special token by its string, in the order of the state."""
    listed, by_text, by_name = (state.get(key) for key in ("special_tokens", *_MAPS))
    if isinstance(listed, dict):  # name to string
        found = {text: name for name, text in listed.items()}
    else:
        texts = listed if isinstance(listed, list) else list(by_text) if isinstance(by_text, dict) else []
        # Where names stand in the list, the template says their strings.
        texts = [known[text] if isinstance(text, str) and text in known else text for text in texts]
        name_of = {text: name for name, text in known.items()}
        if isinstance(by_text, dict) and isinstance(by_name, dict):
            of_id = {id: name for name, id in by_name.items()}
            name_of |= {text: of_id[id] for text, id in by_text.items() if id in of_id}
        found = {text: name_of.get(text, text) for text in texts if isinstance(text, str)}
        if len(found) < len(texts):
            raise InputError("the tokenizer's state lists a special token twice, or one that is no string; restore it")
    if not found or any(not isinstance(text, str) for text in (*found, *found.values())):
        raise InputError("the tokenizer's state does not say its special tokens' strings; restore it from a copy")
    return found


def _ids(
    state: Mapping[str, Any], names: dict[str, str], encoder: Encoder
) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Names and ids of the special tokens by their strings, and the strings whose ids are guessed."""
    by_text, by_name = (state.get(key) for key in _MAPS)
    for found in (by_text, by_name):
        if isinstance(found, dict) and any(type(id) is not int for id in found.values()):
            raise InputError("ids of special tokens must be integers; restore the tokenizer's state from a copy")
    if isinstance(by_text, dict):
        return names, dict(by_text), []
    if isinstance(by_name, dict):
        return _paired(names, by_name)
    added = [text for text in names if text not in encoder.specials]
    in_order = {text: id for id, text in enumerate(added, start=encoder.size)}
    return names, {text: {**in_order, **encoder.specials}[text] for text in names}, added


def _paired(names: dict[str, str], by_name: Mapping[str, int]) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """As `_ids`, where the ids of names are known: what has no known name takes the names that are left, in order."""
    unnamed = [text for text, name in names.items() if name not in by_name]
    left = sorted((id, name) for name, id in by_name.items() if name not in names.values())
    if len(unnamed) != len(left):
        raise InputError(
            f"the tokenizer's state has {len(names)} special tokens and ids of {len(by_name)} names; restore it"
        )
    names = names | {text: name for text, (_, name) in zip(unnamed, left, strict=True)}
    return names, {text: by_name[name] for text, name in names.items()}, unnamed if len(unnamed) > 1 else []


def _refuse_contradicted(
    names: Mapping[str, str],
    ids: Mapping[str, int],
    guessed: Sequence[str],
    eos_token_ids: Sequence[int],
    encoder: Encoder,
) -> None:
    """What the model ends its texts with must be an end."""
    text_of = {id: text for text, id in ids.items()}
    ends = (END_OF_TEXT, "end")
    for id in eos_token_ids:
        text = text_of.get(id, "no token")
        if guessed and id >= encoder.size and names.get(text) not in ends:
            raise InputError(
                f"the model ends texts with token {id}, which would be {text} if the ids followed the order of the "
                "list: they do not; restore the tokenizer's state from a copy"
            )


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, str], guessed: Sequence[str]
) -> list[Change]:
    found = [
        Change(key, None, "missing" if key not in before else str(before[key]), str(after[key]))
        for key in ("version", "base_vocab_size", "model_vocab_size")
        if before.get(key) != after[key]
    ]
    for key in ("special_tokens", "added_token_ids", "files", "data"):
        if before.get(key) != after[key]:
            was = "missing" if key not in before else f"{len(before[key])} entries"
            found.append(Change(key, None, was, f"{len(after[key])} strings" if after[key] else "none"))
    has_ids, has_names = (isinstance(before.get(key), dict) for key in _MAPS)
    for text, id in after["special_token_ids"].items():
        if not (has_ids and has_names):
            was = "no id" if not has_ids else "no name"
            found.append(Change(text, id, was, f"special, named {names[text]}", text in guessed))
    return found
