"""Wrong text sides: tokenizer, special tokens, template, loss mask, BOS, stop ids.

They must show in the rung ids.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import tiktoken

from jaxgpt.chat import Message, Rendered, Turn, TurnTemplate
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import END, END_OF_TEXT, Special
from jaxgpt.vocabularies.kinds import kind_named
from oracle.candidate import Candidate
from oracle.faults.fault import Plant
from oracle.text import Text, render

Change = Callable[[Text], Mapping[str, Any]]
"""A text side to the fields that are wrong."""

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4's tokenizer cuts text before it merges."""
KEPT_MERGES = 40_000


def spoken(change: Change) -> Plant:
    """Other fields of the text side."""

    def plant(candidate: Candidate) -> Candidate:
        assert candidate.text is not None
        return replace(candidate, text=replace(candidate.text, **change(candidate.text)))

    return plant


# -- Text to ids -----------------------------------------------------------------------


def prepared(change: Callable[[str], str]) -> Plant:
    """Text is changed before it is encoded."""
    return spoken(lambda text: {"encode": lambda string: text.encode(change(string))})


def lower_case(string: str) -> str:
    """As for an uncased vocabulary."""
    return string.lower()


def normalised(string: str) -> str:
    """As SentencePiece does by default."""
    return unicodedata.normalize("NFKC", string)


def stripped(string: str) -> str:
    """Spaces at both ends lost."""
    return string.strip()


def with_leading_space(string: str) -> str:
    """SentencePiece's dummy prefix."""
    return f" {string}" if string else string


def unix_lines(string: str) -> str:
    """Python's universal newlines."""
    return string.replace("\r\n", "\n").replace("\r", "\n")


def ascii_only(string: str) -> str:
    """errors="ignore"."""
    return string.encode("ascii", errors="ignore").decode()


@cache
def _ranks() -> dict[bytes, int]:
    tokens = kind_named("gpt2").build(()).token_bytes()
    return {token: id for id, token in enumerate(tokens[:50256])}


@cache
def _with_pattern(pattern: str, ranks: int) -> tiktoken.Encoding:
    kept = {token: id for token, id in _ranks().items() if id < ranks}
    return tiktoken.Encoding("wrong", pat_str=pattern, mergeable_ranks=kept, special_tokens={})


def wrong_regex(text: Text) -> Mapping[str, Any]:
    """GPT-2's merges behind another program's pre-tokenizer (llama.cpp #6920)."""
    return {"encode": lambda string: _with_pattern(CL100K, 50256).encode_ordinary(string)}


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def merges_missing(text: Text) -> Mapping[str, Any]:
    """The merges file was cut off."""
    return {"encode": lambda string: _with_pattern(GPT2, KEPT_MERGES).encode_ordinary(string)}


def bytes_by_value(text: Text) -> Mapping[str, Any]:
    """Byte tokens numbered by their value instead of in the order of the byte-level alphabet."""
    tokens = kind_named("gpt2").build(()).token_bytes()

    def encode(string: str) -> list[int]:
        return [tokens[id][0] if id < 256 else id for id in text.encode(string)]

    return {"encode": encode}


def user_text_parsed(text: Text) -> Mapping[str, Any]:
    """Strings of special tokens that a user types become special tokens."""
    return {"encode": lambda string: text.parse(text, string)}


# -- Ids to text -----------------------------------------------------------------------


def decoded_one_by_one(text: Text) -> Mapping[str, Any]:
    """Each id by itself: characters of several tokens are lost."""
    return {"decode": lambda ids: "".join(text.decode([id]) for id in ids)}


def decoded_and_stripped(text: Text) -> Mapping[str, Any]:
    """A leading space is taken for SentencePiece's."""
    return {"decode": lambda ids: text.decode(ids).removeprefix(" ")}


def alphabet_shown(text: Text) -> Mapping[str, Any]:
    """The byte-level alphabet is printed as it stands in the vocabulary file: Ġ for a space."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {"decode": lambda ids: "".join(shown[byte] for byte in text.decode(ids).encode())}


# -- Special tokens --------------------------------------------------------------------


def specials_shifted(text: Text) -> Mapping[str, Any]:
    """Every special token of the template has the next id."""
    shifted = {
        name: special if name == END_OF_TEXT else Special(name, special.text, special.id + 1)
        for name, special in text.specials.items()
    }
    return {"specials": shifted}


def specials_swapped(text: Text) -> Mapping[str, Any]:
    """The end of a turn and the end of a text have each other's ids."""
    end, stop = text.specials[END], text.specials[END_OF_TEXT]
    swapped = {END: replace(end, id=stop.id), END_OF_TEXT: replace(stop, id=end.id)}
    return {"specials": {**text.specials, **swapped}}


def _splitting(pattern: Callable[[str], str]) -> Change:
    def change(text: Text) -> Mapping[str, Any]:
        ids = {special.text: special.id for special in text.specials.values()}
        by_group = list(ids.values())
        marker = re.compile("|".join(f"({pattern(string)})" for string in ids))

        def parse(_: Text, string: str) -> list[int]:
            found: list[int] = []
            at = 0
            for match in marker.finditer(string):
                found += [*text.encode(string[at : match.start()]), by_group[(match.lastindex or 1) - 1]]
                at = match.end()
            return found + text.encode(string[at:])

        return {"parse": parse}

    return change


prefix_matched = _splitting(lambda string: re.escape(string[:-2]) + "(?:" + re.escape(string[-2:]) + ")?")
"""The beginning of a special token's string is enough for it."""
spaces_swallowed = _splitting(lambda string: r"\s*" + re.escape(string) + r"\s*")
"""A special token swallows the spaces around it (lstrip and rstrip of an added token)."""


# -- Conversations ---------------------------------------------------------------------


def templated(change: Callable[[TurnTemplate], TurnTemplate]) -> Plant:
    """Another template."""

    def of(text: Text) -> Mapping[str, Any]:
        if not isinstance(text.template, TurnTemplate):
            raise InputError(
                "this checkpoint's template is a program, which has no turns to change; "
                "plant a class of the rendering, such as 'system message added'"
            )
        return {"template": change(text.template)}

    return spoken(of)


def _turns(template: TurnTemplate, change: Callable[[str, Turn], Turn]) -> TurnTemplate:
    return replace(template, turns={role: change(role, turn) for role, turn in template.turns.items()})


def no_separator(template: TurnTemplate) -> TurnTemplate:
    """Nothing between the end of a turn and the next."""
    return _turns(template, lambda _, turn: replace(turn, suffix=turn.suffix[:1]))


def no_line_after_role(template: TurnTemplate) -> TurnTemplate:
    """The role's name without its line break."""

    def change(_: str, turn: Turn) -> Turn:
        return replace(turn, prefix=tuple(p.rstrip("\n") if isinstance(p, str) else p for p in turn.prefix))

    return _turns(template, change)


def user_turn_open(template: TurnTemplate) -> TurnTemplate:
    """What a user says is never ended."""
    return _turns(template, lambda role, turn: turn if role == template.trained_role else replace(turn, suffix=()))


def roles_swapped(template: TurnTemplate) -> TurnTemplate:
    """The user speaks as the assistant, and the other way round."""
    other = {"user": "assistant", "assistant": "user"}
    turns = {
        role: replace(turn, prefix=template.turns[other.get(role, role)].prefix)
        for role, turn in template.turns.items()
    }
    return replace(template, turns=turns)


def rendered(change: Callable[[Text, Sequence[Message]], Rendered]) -> Plant:
    """Another rendering of a conversation."""
    return spoken(lambda _: {"render": change})


def contents_stripped(text: Text, messages: Sequence[Message]) -> Rendered:
    """Contents lose the spaces at their ends (Llama 2's template)."""
    return render(text, [Message(role=m["role"], content=m["content"].strip()) for m in messages])


def default_system(text: Text, messages: Sequence[Message]) -> Rendered:
    """A system message that nobody gave (Qwen2's template)."""
    given = any(message["role"] == "system" for message in messages)
    added = [] if given else [Message(role="system", content="You are a helpful assistant.")]
    return render(text, [*added, *messages])


def end_of_text_in_front(text: Text, messages: Sequence[Message]) -> Rendered:
    """A BOS before the first turn."""
    right = render(text, messages)
    return Rendered([text.specials[END_OF_TEXT].id, *right.ids], [0, *right.mask])


def everything_trained(text: Text, messages: Sequence[Message]) -> Rendered:
    """The mask is 1 everywhere."""
    right = render(text, messages)
    return Rendered(right.ids, [1] * len(right.ids))


def end_not_trained(text: Text, messages: Sequence[Message]) -> Rendered:
    """Replies are trained without the token that ends them."""
    right = render(text, messages)
    following = [*right.mask[1:], 0]
    return Rendered(right.ids, [here & after for here, after in zip(right.mask, following, strict=True)])


def header_trained(text: Text, messages: Sequence[Message]) -> Rendered:
    """The last token of a reply's header is trained as part of the reply."""
    right = render(text, messages)
    following = [*right.mask[1:], 0]
    return Rendered(right.ids, [here | after for here, after in zip(right.mask, following, strict=True)])


def mask_one_late(text: Text, messages: Sequence[Message]) -> Rendered:
    """The mask is off by one."""
    right = render(text, messages)
    return Rendered(right.ids, [0, *right.mask[:-1]])


def last_reply_only(text: Text, messages: Sequence[Message]) -> Rendered:
    """Only the last reply of a conversation is trained."""
    right = render(text, messages)
    earlier = render(text, messages[:-2]).mask if len(messages) > 2 else []
    return Rendered(right.ids, [0] * len(earlier) + right.mask[len(earlier) :])


# -- Around a text ---------------------------------------------------------------------


def begun(count: int) -> Plant:
    """So many ends of text in front of every prompt."""

    def of(text: Text) -> Mapping[str, Any]:
        front = [text.specials[END_OF_TEXT].id] * count
        return {"prompt": lambda _, string: [*front, *text.encode(string)]}

    return spoken(of)


def end_does_not_stop(text: Text) -> Mapping[str, Any]:
    """Generation runs on behind the end of a turn."""
    return {"stop_ids": tuple(id for id in text.stop_ids if id != text.specials[END].id)}


def pad_stops(text: Text) -> Mapping[str, Any]:
    """One id too many ends a reply."""
    return {"stop_ids": (*text.stop_ids, text.specials["pad"].id)}
