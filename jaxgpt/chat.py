"""Messages to ids and loss mask, made together, through templates that are data.

Only a template can emit a special token. What people and models write is encoded
apart from it, as ordinary text, so no string in a message becomes a control token.

There are two kinds of template behind the same functions: turns written down as data,
here, and programs imported with a model (`jaxgpt.jinja.template`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from jaxgpt.errors import InputError, first
from jaxgpt.tokenizer import ALWAYS, END, END_OF_TEXT, Tokenizer
from jaxgpt.vocabularies.kinds import exact_keys, refuse_invalid_unicode


class Message(TypedDict):
    """One turn, as in the field's chat files; other keys are not read."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """Ids of a conversation and which of them are trained (1) or only read (0)."""

    ids: list[int]
    mask: list[int]
    unproved: str = ""
    """Why nothing of it may train although it has replies: an imported template does not let them be told apart."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask), f"{len(self.ids)} ids with {len(self.mask)} mask values"
        assert not (self.unproved and any(self.mask)), "what is not proved must not train"


class Template(ABC):
    """How a conversation becomes tokens. The functions of this module use it; nothing else has to know its kind."""

    name: str
    specials: Mapping[str, str]
    """Special tokens it needs, name to string."""
    trained_role: str
    """The role whose content and end token are trained, and that `generate` speaks."""
    stop_strings: tuple[str, ...]
    """Texts that end a reply, for turns that ordinary text can open."""
    warning: str
    """Printed before a chat, where typed text can imitate a turn."""

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Whose messages it knows."""

    @property
    @abstractmethod
    def end(self) -> str:
        """Name of the special token that ends a trained turn: one at which generation stops."""

    @abstractmethod
    def said(self, message: Message) -> str:
        """The content as it is encoded: as it is, but for the white space that an imported template trims."""

    @abstractmethod
    def rendered(self, messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool) -> Rendered:
        """See `render`; the messages are checked."""

    @abstractmethod
    def as_trained(self) -> "Template":
        """The template for a model after SFT: its prompt goes up to where replies begin in training."""

    @abstractmethod
    def closing(self, tokenizer: Tokenizer) -> list[int]:
        """See `closing`."""

    @abstractmethod
    def opened(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """See `opened`; the messages are checked."""

    @abstractmethod
    def following(self, history: Sequence[Message], messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """See `following`; the messages are checked."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `from_dict` makes it again."""

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Template":
        """Inverse of `to_dict`, for both kinds; raises InputError for anything else."""
        if values.get("kind") != "jinja":
            return TurnTemplate.of_dict(values)
        from jaxgpt.jinja.template import JinjaTemplate

        return JinjaTemplate.of_dict(values)


# -- Turns as data ---------------------------------------------------------------------


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
class TurnTemplate(Template):
    """What goes around the content of each role, written down.

    The turn of the trained role ends with the end marker: it is trained with the
    content, and what follows it in the suffix separates turns.

    Raises:
        InputError: at construction, where the parts contradict each other.
    """

    name: str
    specials: Mapping[str, str]
    """Those besides `end_of_text`; `end` ends a turn."""
    turns: Mapping[str, Turn]
    """By role."""
    trained_role: str = "assistant"
    stop_strings: tuple[str, ...] = ()
    warning: str = ""

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
    def roles(self) -> tuple[str, ...]:
        """Those that have a turn."""
        return tuple(self.turns)

    @property
    def end(self) -> str:
        """Name of the special token that ends a trained turn: one of the tokenizer's stop ids."""
        return END if END in self.specials else END_OF_TEXT

    def said(self, message: Message) -> str:
        """The content, as it is."""
        return message["content"]

    def rendered(self, messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool) -> Rendered:
        """Each message by itself: the first k messages render to the beginning of the whole."""
        ids: list[int] = []
        mask: list[int] = []
        for message in messages:
            turn = self.turns[message["role"]]
            prefix, suffix = _piece_ids(turn.prefix, tokenizer), _piece_ids(turn.suffix, tokenizer)
            body = tokenizer.encode(message["content"])
            # The first token of a trained turn's suffix is its end token.
            trained = len(body) + 1 if message["role"] == self.trained_role else 0
            ids += [*prefix, *body, *suffix]
            mask += [0] * len(prefix) + [1] * trained + [0] * (len(body) + len(suffix) - trained)
        if generation_prompt:
            prompt = _piece_ids(self.turns[self.trained_role].prefix, tokenizer)
            ids += prompt
            mask += [0] * len(prompt)
        return Rendered(ids, mask)

    def as_trained(self) -> "TurnTemplate":
        """The same: replies begin where the prompt ends."""
        return self

    def closing(self, tokenizer: Tokenizer) -> list[int]:
        """The suffix of the trained turn."""
        return _piece_ids(self.turns[self.trained_role].suffix, tokenizer)

    def opened(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """All of them."""
        return self.rendered(messages, tokenizer, generation_prompt=False).ids

    def following(self, history: Sequence[Message], messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The new messages, whatever was said before."""
        return self.rendered(messages, tokenizer, generation_prompt=True).ids

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a special token in a turn is `{"special": name}`."""
        turns = {
            role: {side: [_piece_to_json(piece) for piece in getattr(turn, side)] for side in _SIDES}
            for role, turn in self.turns.items()
        }
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "specials": dict(self.specials), "turns": turns, "stop_strings": list(self.stop_strings)}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> "TurnTemplate":
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


CHATML = TurnTemplate(
    name="chatml",
    specials={"start": "<|im_start|>", END: "<|im_end|>"},
    turns={role: _chatml_turn(role) for role in ("system", "user", "assistant")},
)
"""`<|im_start|>user\\nHi<|im_end|>\\n`: as Qwen2's, without a system message of its own."""


def paired_tags(
    system: str = "<|system|>", user: str = "<|user|>", assistant: str = "<|assistant|>", end: str = "<|end|>"
) -> TurnTemplate:
    """`<|user|>Hi<|end|>`: one special token opens a role's turn, one ends every turn.

    Raises:
        InputError: two of the strings are the same, or one is empty.
    """
    tags = {"system": system, "user": user, "assistant": assistant}
    texts = [*tags.values(), end]
    if len(set(texts)) < len(texts) or "" in texts:
        raise InputError(f"paired tags must be four different strings, got {', '.join(map(repr, texts))}")
    turns = {role: Turn((Marker(role),), (Marker(END),)) for role in tags}
    return TurnTemplate(name="tags", specials={**tags, END: end}, turns=turns)


TAGS = paired_tags()


def _plain_turn(label: str, *end: Piece) -> Turn:
    # The line break after the label is a token of its own, as in running text; a space would
    # not be: BPE joins it to the word that follows, which is encoded apart here.
    return Turn((f"{label}:\n",), (*end, "\n\n"))


PLAIN = TurnTemplate(
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

TEMPLATES: dict[str, TurnTemplate] = {template.name: template for template in (CHATML, TAGS, PLAIN)}


# -- Rendering -------------------------------------------------------------------------


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, *, generation_prompt: bool = False
) -> Rendered:
    """Ids and loss mask of a conversation.

    Trained are the content of the template's `trained_role` and the end token after it,
    nothing else; nothing at all where an imported template does not let that be proved
    (`Rendered.unproved`).

    Args:
        messages: at least one `{"role", "content"}`.
        tokenizer: has the template's special tokens.
        template: what goes around each content.
        generation_prompt: also open the turn that a reply continues.

    Raises:
        InputError: no messages, an unknown role, a content that is not a string or not
            valid Unicode, a tokenizer without the template's special tokens, or an
            imported template that refuses or leaves out a message.
    """
    if not messages:
        raise InputError("a conversation needs at least one message, got none")
    rendered = template.rendered(_checked(messages, template), tokenizer, generation_prompt)
    _check_last_trained(rendered, tokenizer.special(template.end).id)
    return rendered


def opened(messages: Sequence[Message], tokenizer: Tokenizer, template: Template) -> list[int]:
    """Ids of a conversation that is going to be continued by `following`.

    Args:
        messages: none, an opening without a reply, or a conversation that ends with one.
            An imported template can need the next message to render an opening; then
            there are no ids yet, and `following` begins with them.
        tokenizer: as for `render`.
        template: as for `render`.

    Raises:
        InputError: as `render`.
    """
    return template.opened(_checked(messages, template), tokenizer) if messages else []


def following(
    history: Sequence[Message], messages: Sequence[Message], tokenizer: Tokenizer, template: Template
) -> list[int]:
    """Ids from the end of the last turn, which was closed, to the beginning of the reply to `messages`.

    Args:
        history: what was said before, ending with a reply if there was any.
        messages: only the new ones.
        tokenizer: as for `render`.
        template: as for `render`.

    Raises:
        InputError: as `render`.
    """
    if not messages:
        raise InputError("a conversation goes on with at least one message, got none")
    checked = _checked([*history, *messages], template)
    return template.following(checked[: len(history)], checked[len(history) :], tokenizer)


def closing(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The end token of a reply and what separates it from any next turn."""
    return template.closing(tokenizer)


def render_continuation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    *,
    reply_ended: bool = True,
    history: Sequence[Message] = (),
) -> list[int]:
    """Ids to append after a generated reply, so that the next one can follow.

    A session's ids (prompt, reply with its end token, continuation, …) are those of
    `render` on the whole conversation, without tokenising anything twice, wherever
    the model spells its reply as the tokenizer would and the template renders old
    turns as it did when they were new.

    Args:
        messages: only the new ones.
        tokenizer: as for `render`.
        template: as for `render`.
        reply_ended: the reply's last id is its end token. Otherwise (cut at a limit, a
            stop string or by the user) the end token comes first here.
        history: what was said before, the reply included; only imported templates look
            at it. By default one question and the reply.

    Raises:
        InputError: as `render`.
    """
    before = history or [Message(role="user", content=""), Message(role=template.trained_role, content="")]
    closed = closing(tokenizer, template)
    if reply_ended and closed[:1] == [tokenizer.special(template.end).id]:
        closed = closed[1:]
    return closed + following(before, messages, tokenizer, template)


def _checked(messages: Sequence[object], template: Template) -> list[Message]:
    return [_checked_message(message, number, template) for number, message in enumerate(messages, start=1)]


def _checked_message(message: object, number: int, template: Template) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be an object with role and content, got {type(message).__name__}")
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise InputError(f"message {number} lacks {' and '.join(missing)}; each needs role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in template.roles:
        raise InputError(
            f"message {number} has role {role!r}; template {template.name} knows {', '.join(template.roles)}"
        )
    if not isinstance(content, str):
        raise InputError(f"message {number} ({role}) has content of type {type(content).__name__}; expected a string")
    refuse_invalid_unicode(content)
    return Message(role=role, content=content)


def _piece_ids(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.special(piece.name).id] if isinstance(piece, Marker) else tokenizer.encode(piece)
    return ids


def _check_last_trained(rendered: Rendered, end_id: int) -> None:
    """The last trained token is the end token: a model that never sees it trained never stops."""
    trained = [id for id, on in zip(rendered.ids, rendered.mask, strict=True) if on]
    assert not trained or trained[-1] == end_id, f"last trained token is {trained[-1]}, not the end token {end_id}"
