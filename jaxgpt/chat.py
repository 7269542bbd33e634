"""Messages to ids and loss mask, made together, through templates that are data.

Only a template can emit a special token. What people and models write is encoded
apart from it, as ordinary text, so no string in a message becomes a control token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from jaxgpt.errors import InputError, first
from jaxgpt.tokenizer import ALWAYS, END, END_OF_TEXT, Tokenizer
from jaxgpt.vocabulary import exact_keys


class Message(TypedDict):
    """One turn, as in the field's chat files; other keys are not read."""

    role: str
    content: str


@dataclass(frozen=True)
class Marker:
    """The special token of that name, in a template."""

    name: str


Piece = Marker | str
"""A special token, or literal text of the template."""


@dataclass(frozen=True)
class Turn:
    """What a template puts around the content of one role."""

    prefix: tuple[Piece, ...]
    suffix: tuple[Piece, ...]


@dataclass(frozen=True)
class Template:
    """How a conversation becomes tokens.

    The turn of the trained role ends with the end marker: it is trained with the
    content, and what follows it in the suffix separates turns.

    Raises:
        InputError: at construction, where the parts contradict each other.
    """

    name: str
    specials: Mapping[str, str]
    """Special tokens it needs besides `end_of_text`, name to string; `end` ends a turn."""
    turns: Mapping[str, Turn]
    """By role."""
    trained_role: str = "assistant"
    """The role whose content and end token are trained, and that `generate` speaks."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a reply, for turns that ordinary text can open."""
    warning: str = ""
    """Printed before a chat, where typed text can imitate a turn."""

    def __post_init__(self) -> None:
        if self.trained_role not in self.turns:
            raise InputError(
                f"template {self.name} trains {self.trained_role}, its turns are {first(list(self.turns))}"
            )
        reserved = sorted(ALWAYS.keys() & self.specials.keys())
        if reserved:
            raise InputError(f"template {self.name} redefines {first(reserved)}, which every tokenizer has; rename it")
        known = {END_OF_TEXT, *self.specials}
        for role, turn in self.turns.items():
            for piece in (*turn.prefix, *turn.suffix):
                if isinstance(piece, Marker) and piece.name not in known:
                    raise InputError(f"template {self.name}, {role}: no special token {piece.name!r}; declare it")
        if self.turns[self.trained_role].suffix[:1] != (Marker(self.end),):
            raise InputError(
                f"template {self.name}: the suffix of {self.trained_role} must begin with the special token "
                f"{self.end}, or a reply never ends"
            )

    @property
    def end(self) -> str:
        """Name of the special token that ends a trained turn: one of the tokenizer's stop ids."""
        return END if END in self.specials else END_OF_TEXT

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a special token in a turn is `{"special": name}`."""
        turns = {
            role: {side: [_piece_to_json(piece) for piece in getattr(turn, side)] for side in _SIDES}
            for role, turn in self.turns.items()
        }
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "specials": dict(self.specials), "turns": turns, "stop_strings": list(self.stop_strings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Template":
        """Inverse of `to_dict`; raises InputError for anything else."""
        exact_keys("chat template", values, {field.name for field in fields(cls)})
        for key in ("name", "trained_role", "warning"):
            _text(key, values[key])
        return cls(
            name=values["name"],
            specials={name: _text(f"specials.{name}", text) for name, text in _object("specials", values).items()},
            turns={role: _turn_from_json(role, turn) for role, turn in _object("turns", values).items()},
            trained_role=values["trained_role"],
            stop_strings=tuple(_text("stop_strings", text) for text in _list("stop_strings", values)),
            warning=values["warning"],
        )


_SIDES = ("prefix", "suffix")


def _piece_to_json(piece: Piece) -> str | dict[str, str]:
    return {"special": piece.name} if isinstance(piece, Marker) else piece


def _piece_from_json(where: str, piece: object) -> Piece:
    if isinstance(piece, str):
        return piece
    exact_keys(f"chat template, {where}", piece, {"special"})
    assert isinstance(piece, Mapping)
    return Marker(_text(where, piece["special"]))


def _turn_from_json(role: str, turn: Mapping[str, Any]) -> Turn:
    exact_keys(f"chat template, {role}", turn, set(_SIDES))
    prefix, suffix = (tuple(_piece_from_json(role, piece) for piece in _list(side, turn)) for side in _SIDES)
    return Turn(prefix, suffix)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"chat template, {where}: expected a string, got {type(value).__name__}")
    return value


def _list(key: str, values: Mapping[str, Any]) -> list[Any]:
    if not isinstance(values[key], list):
        raise InputError(f"chat template, {key}: expected a list, got {type(values[key]).__name__}")
    return values[key]


def _object(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values[key], dict):
        raise InputError(f"chat template, {key}: expected an object, got {type(values[key]).__name__}")
    return values[key]


# -- Templates -------------------------------------------------------------------------


def _chatml_turn(role: str) -> Turn:
    return Turn((Marker("start"), f"{role}\n"), (Marker(END), "\n"))


CHATML = Template(
    name="chatml",
    specials={"start": "<|im_start|>", END: "<|im_end|>"},
    turns={role: _chatml_turn(role) for role in ("system", "user", "assistant")},
)
"""`<|im_start|>user\\nHi<|im_end|>\\n`: as Qwen2's, without a system message of its own."""


def paired_tags(
    system: str = "<|system|>", user: str = "<|user|>", assistant: str = "<|assistant|>", end: str = "<|end|>"
) -> Template:
    """`<|user|>Hi<|end|>`: one special token opens a role's turn, one ends every turn.

    Raises:
        InputError: two of the strings are the same, or one is empty.
    """
    tags = {"system": system, "user": user, "assistant": assistant}
    texts = [*tags.values(), end]
    if len(set(texts)) < len(texts) or "" in texts:
        raise InputError(f"paired tags must be four different strings, got {', '.join(map(repr, texts))}")
    turns = {role: Turn((Marker(role),), (Marker(END),)) for role in tags}
    return Template(name="tags", specials={**tags, END: end}, turns=turns)


TAGS = paired_tags()


def _plain_turn(label: str, *end: Piece) -> Turn:
    # The line break after the label is a token of its own, as in running text; a space would
    # not be: BPE joins it to the word that follows, which is encoded apart here.
    return Turn((f"{label}:\n",), (*end, "\n\n"))


PLAIN = Template(
    name="plain",
    specials={},
    turns={
        "system": _plain_turn("System"),
        "user": _plain_turn("User"),
        "assistant": _plain_turn("Assistant", Marker(END_OF_TEXT)),
    },
    stop_strings=("\nUser:", "\nSystem:"),
    warning="template plain marks turns with ordinary text: a message that contains `Assistant:` can imitate a turn",
)
"""`User:\\nHi\\n\\nAssistant:\\nHello<|endoftext|>`: no special token but the one every model has."""

TEMPLATES: dict[str, Template] = {template.name: template for template in (CHATML, TAGS, PLAIN)}


# -- Rendering -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """Ids of a conversation and which of them are trained (1) or only read (0)."""

    ids: list[int]
    mask: list[int]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask), f"{len(self.ids)} ids with {len(self.mask)} mask values"


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, *, generation_prompt: bool = False
) -> Rendered:
    """Ids and loss mask of a conversation.

    Each message is rendered by itself: the first k messages of a conversation render
    to the beginning of the whole. Trained are the content of the template's
    `trained_role` and the end token after it, nothing else.

    Args:
        messages: at least one `{"role", "content"}`.
        tokenizer: has the template's special tokens.
        template: what goes around each content.
        generation_prompt: also open the turn that a reply continues.

    Raises:
        InputError: no messages, an unknown role, a content that is not a string or not
            valid Unicode, or a tokenizer without the template's special tokens.
    """
    if not messages:
        raise InputError("a conversation needs at least one message, got none")
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number, template)
        turn = template.turns[role]
        prefix, suffix = _piece_ids(turn.prefix, tokenizer), _piece_ids(turn.suffix, tokenizer)
        body = tokenizer.encode(content)
        # The first token of a trained turn's suffix is its end token.
        trained = len(body) + 1 if role == template.trained_role else 0
        ids += [*prefix, *body, *suffix]
        mask += [0] * len(prefix) + [1] * trained + [0] * (len(body) + len(suffix) - trained)
    if generation_prompt:
        prompt = _piece_ids(template.turns[template.trained_role].prefix, tokenizer)
        ids += prompt
        mask += [0] * len(prompt)
    rendered = Rendered(ids, mask)
    _check_last_trained(rendered, tokenizer.special(template.end).id)
    return rendered


def render_continuation(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, *, reply_ended: bool = True
) -> list[int]:
    """Ids to append after a generated reply, so that the next one can follow.

    A session's ids (prompt, reply with its end token, continuation, …) are those of
    `render` on the whole conversation, without tokenising anything twice, wherever
    the model spells its reply as the tokenizer would.

    Args:
        messages: only the new ones.
        tokenizer: as for `render`.
        template: as for `render`.
        reply_ended: the reply's last id is its end token. Otherwise (cut at a limit, a
            stop string or by the user) the end token comes first here.

    Raises:
        InputError: as `render`.
    """
    end, *separator = _piece_ids(template.turns[template.trained_role].suffix, tokenizer)
    closing = separator if reply_ended else [end, *separator]
    return closing + render(messages, tokenizer, template, generation_prompt=True).ids


def _checked(message: object, number: int, template: Template) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be an object with role and content, got {type(message).__name__}")
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise InputError(f"message {number} lacks {' and '.join(missing)}; each needs role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in template.turns:
        raise InputError(
            f"message {number} has role {role!r}; template {template.name} knows {', '.join(template.turns)}"
        )
    if not isinstance(content, str):
        raise InputError(f"message {number} ({role}) has content of type {type(content).__name__}; expected a string")
    return role, content


def _piece_ids(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.special(piece.name).id] if isinstance(piece, Marker) else tokenizer.encode(piece)
    return ids


def _check_last_trained(rendered: Rendered, end_id: int) -> None:
    """The last trained token is the end token: a model that never sees it trained never stops."""
    trained = [id for id, on in zip(rendered.ids, rendered.mask, strict=True) if on]
    assert not trained or trained[-1] == end_id, f"last trained token is {trained[-1]}, not the end token {end_id}"
