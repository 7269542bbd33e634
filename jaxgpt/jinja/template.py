"""Chat templates imported with a model: programs in Jinja, as other systems store them.

Such a template renders a conversation to one string. Here its own text and the contents
of messages are told apart (`jaxgpt.jinja.layout`), so that contents are encoded as
ordinary text and only what the template itself writes can become a special token.
The loss mask comes from the same places, and is proved for every conversation.

Where a template changes contents (beyond trimming white space, which is done as it does
it), chat keeps them as they were written, and nothing of the conversation may train.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from jaxgpt.chat import Message, Rendered, Template
from jaxgpt.errors import InputError
from jaxgpt.jinja import process
from jaxgpt.jinja.layout import Segment, cut, joined, message_names, missing, place_of, text_after, with_sentinels
from jaxgpt.jinja.process import Failure, Rendering
from jaxgpt.tokenizer import END_OF_TEXT, Tokenizer
from jaxgpt.vocabularies.kinds import exact_keys

Trim = Literal["both", "left", "right"]
Placed = Literal["config", "config list", "files"]
DEFAULT = "default"
AT_ONCE = 64
"""Renderings in one request; together they have one second."""


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """A template's source, and what was found out about it when it was imported."""

    sources: Mapping[str, str]
    """By name, `default` among them; only that one is rendered, the others are kept for export."""
    placed: Placed
    """Where they were stored: tokenizer_config.json (one, or a list) or files of their own."""
    variables: Mapping[str, str]
    """Strings it may use: `bos_token`, `eos_token` and the like."""
    specials: Mapping[str, str]
    known_roles: tuple[str, ...]
    end_name: str
    """Of the special token that follows a reply; "" where none does."""
    closing_text: str
    """From the end of a reply to where the next turn begins."""
    trims: Mapping[str, Trim]
    """Roles whose contents it rids of white space at the ends."""
    gap: str
    """What it writes between its own generation prompt and a reply."""
    primed: bool = False
    """The prompt of a reply has the gap too."""
    warning: str = ""
    name: str = "jinja"
    trained_role: str = "assistant"
    stop_strings: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The template that is rendered."""
        return self.sources[DEFAULT]

    @property
    def roles(self) -> tuple[str, ...]:
        """Those it rendered when it was imported."""
        return self.known_roles

    @property
    def end(self) -> str:
        """Name of the special token that ends a reply."""
        return self.end_name or END_OF_TEXT

    def said(self, message: Message) -> str:
        """The content, trimmed as the template trims those of its role."""
        return trimmed(message["content"], self.trims.get(message["role"]))

    def as_trained(self) -> "JinjaTemplate":
        """Primed where there is a gap: in training it is read before a reply, so it must be in a prompt."""
        return replace(self, primed=True) if self.gap else self

    # -- Rendering ---------------------------------------------------------------------

    def rendered(self, messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool) -> Rendered:
        """The template's text and the contents, each encoded apart; a mask if all of it is proved.

        Proved is that the template's output is just that; that each reply stands in it
        once, followed by the end token; that the prompt of each reply, text and ids, is
        the beginning of the whole; and that the ids of the template's text decode to it.
        """
        marked = with_sentinels(messages)
        if generation_prompt:
            said = [self.said(message) for message in messages]
            return _untrained(self._ids(self._prompt(messages), said, tokenizer))
        spelled, whole = self._texts([Rendering(marked), Rendering(messages)])
        layout = self._cut(spelled, messages)
        said = [self.said(message) for message in messages]
        replies = [i for i, message in enumerate(messages) if message["role"] == self.trained_role]
        unproved = ""
        if replies:
            unproved = self._changed(messages, layout, whole) or self._unended(messages, layout, replies)
            unproved = unproved or self._misfit(messages, layout, replies, tokenizer)
        ids: list[int] = []
        mask: list[int] = []
        for before, segment in zip([None, *layout], layout, strict=False):
            new = self._encoded(segment, said, tokenizer)
            # The first token after a reply is its end token.
            trained = 0 if unproved else len(new) if segment in replies else 1 if before in replies else 0
            ids += new
            mask += [1] * trained + [0] * (len(new) - trained)
        return Rendered(ids, mask, unproved)

    def _prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The layout up to where the reply to the messages begins."""
        if not self.primed:
            return self._cut(self._texts([Rendering(with_sentinels(messages), True)])[0], messages)
        answered = [*messages, Message(role=self.trained_role, content="")]
        layout = self._cut(self._texts([Rendering(with_sentinels(answered))])[0], answered)
        return layout[: place_of(layout, len(messages))]

    def _texts(self, renderings: Sequence[Rendering]) -> list[str]:
        texts: list[str] = []
        for begin in range(0, len(renderings), AT_ONCE):
            for answer in process.render(self.source, self.variables, renderings[begin : begin + AT_ONCE]):
                if isinstance(answer, Failure):
                    raise InputError(str(answer))
                texts.append(answer)
        return texts

    def _cut(self, spelled: str, messages: Sequence[Message]) -> list[Segment]:
        layout = cut(spelled)
        lost = missing(layout, len(messages))
        if lost:
            raise InputError(f"chat template leaves out or rewrites the content of {message_names(messages, lost)}")
        return layout

    def _encoded(self, segment: Segment, said: Sequence[str], tokenizer: Tokenizer) -> list[int]:
        if isinstance(segment, int):
            return tokenizer.encode(said[segment])
        return tokenizer.encode(segment, specials=True)

    # -- Proof -------------------------------------------------------------------------

    def _changed(self, messages: Sequence[Message], layout: Sequence[Segment], whole: str) -> str:
        """The template's output is not its text around these contents."""
        said = [self.said(message) for message in messages]
        if whole == joined(layout, said):
            return ""
        marked = with_sentinels(messages)
        sentinels = [message["content"] for message in marked]
        alone = [Rendering([*marked[:i], messages[i], *marked[i + 1 :]]) for i in range(min(len(messages), AT_ONCE))]
        for i, text in enumerate(process.render(self.source, self.variables, alone)):
            if text != joined(layout, [*sentinels[:i], said[i], *sentinels[i + 1 :]]):
                return f"chat template changes the content of {message_names(messages, [i])}, or depends on it"
        return "chat template changes contents, or depends on them"

    def _unended(self, messages: Sequence[Message], layout: Sequence[Segment], replies: Sequence[int]) -> str:
        """A reply that does not stand there once, followed by the end token."""
        for reply in replies:
            where = message_names(messages, [reply])
            if list(layout).count(reply) > 1:
                return f"chat template repeats {where}"
            after = text_after(layout, reply)
            if not self.end_name or not after.startswith(self.specials[self.end_name]):
                wanted = self.specials[self.end_name] if self.end_name else "a special token"
                return f"chat template puts {after[:20]!r} after {where}, expected {wanted} to end it"
        return ""

    def _misfit(
        self, messages: Sequence[Message], layout: list[Segment], replies: Sequence[int], tokenizer: Tokenizer
    ) -> str:
        """A reply's prompt is not the beginning of the conversation, in text or in ids."""
        marked, said = with_sentinels(messages), [self.said(message) for message in messages]
        try:
            asked = [Rendering(told[:reply], True) for told in (marked, messages) for reply in replies]
            texts = self._texts(asked)
        except InputError as error:
            return f"the prompt of a reply cannot be rendered: {error}"
        for reply, sentinels, prompt in zip(replies, texts, texts[len(replies) :], strict=False):
            where = message_names(messages, [reply])
            begun, before = cut(sentinels), layout[: place_of(layout, reply)]
            if prompt != joined(begun, said) or not joined(before, said).startswith(prompt):
                return f"chat template does not render the messages before {where} to the beginning of the conversation"
            if not _begins(self._ids(before, said, tokenizer), self._ids(begun, said, tokenizer)):
                return f"the tokens before {where} are not those of its prompt"
        for segment in layout:
            if isinstance(segment, str) and tokenizer.decode(tokenizer.encode(segment, specials=True)) != segment:
                return f"the tokens of the template's text do not decode to it, near {segment[:20]!r}"
        return ""

    def _ids(self, layout: Sequence[Segment], said: Sequence[str], tokenizer: Tokenizer) -> list[int]:
        return [id for segment in layout for id in self._encoded(segment, said, tokenizer)]

    # -- Going on ----------------------------------------------------------------------

    def closing(self, tokenizer: Tokenizer) -> list[int]:
        """The end token and what follows it, whatever is said next."""
        return tokenizer.encode(self.closing_text, specials=True)

    def opened(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Nothing before there is a reply: the template may put a system message into the first question."""
        replies = [i for i, message in enumerate(messages) if message["role"] == self.trained_role]
        if not replies:
            return []
        if replies[-1] != len(messages) - 1:
            raise InputError(f"a conversation to go on with ends with a message of the {self.trained_role}")
        layout = self._cut(self._texts([Rendering(with_sentinels(messages))])[0], messages)
        said = [self.said(message) for message in messages]
        return self._ids(layout[: place_of(layout, replies[-1]) + 1], said, tokenizer) + self.closing(tokenizer)

    def following(self, history: Sequence[Message], messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """What the template writes after the last reply, new messages and prompt; all of it if there is none."""
        everything = [*history, *messages]
        layout = self._prompt(everything)
        said = [self.said(message) for message in everything]
        replies = [i for i, message in enumerate(history) if message["role"] == self.trained_role]
        if not replies:
            return self._ids(layout, said, tokenizer)
        rest = layout[place_of(layout, replies[-1]) + 1 :]
        early = sorted(set(range(len(history), len(everything))) - set(rest))
        if early:
            raise InputError(f"chat template puts {message_names(everything, early)} before the last reply; start over")
        if not isinstance(rest[0], str) or not rest[0].startswith(self.closing_text):
            raise InputError("chat template ends this reply as no other, so that the conversation cannot go on")
        return self._ids([rest[0][len(self.closing_text) :], *rest[1:]], said, tokenizer)

    # -- As data -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with kind `jinja`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        return {"kind": "jinja", **plain, "known_roles": list(self.roles), "stop_strings": list(self.stop_strings)}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> "JinjaTemplate":
        """Inverse of `to_dict`; raises InputError for anything else. Nothing is rendered."""
        exact_keys("chat template", values, {"kind", *(field.name for field in fields(cls))})
        for name in ("sources", "variables", "specials", "trims"):
            _each_text(name, values[name], dict)
        if set(values["trims"].values()) - {*get_args(Trim)}:
            raise InputError(f"chat template, trims: expected {', '.join(get_args(Trim))} of each role")
        for name in ("known_roles", "stop_strings"):
            _each_text(name, values[name], list)
        texts = ("placed", "end_name", "closing_text", "gap", "warning", "name", "trained_role")
        _each_text("strings", {name: values[name] for name in texts}, dict)
        made = {name: value for name, value in values.items() if name != "kind"}
        made |= {name: tuple(values[name]) for name in ("known_roles", "stop_strings")}
        template = cls(**made)
        if (
            DEFAULT not in template.sources
            or template.placed not in get_args(Placed)
            or type(template.primed) is not bool
        ):
            raise InputError(
                f"chat template of kind jinja has no source `default`, or says {template.placed!r}, not where"
            )
        if template.end_name and template.end_name not in template.specials:
            raise InputError(f"chat template ends replies with {template.end_name!r}, which is none of its specials")
        return template


def trimmed(content: str, trim: Trim | None) -> str:
    """The content as Jinja's `trim`, or `lstrip()` or `rstrip()`, leaves it."""
    if trim is None:
        return content
    return {"both": content.strip, "left": content.lstrip, "right": content.rstrip}[trim]()


def _untrained(ids: list[int]) -> Rendered:
    return Rendered(ids, [0] * len(ids))


def _begins(ids: list[int], beginning: list[int]) -> bool:
    return ids[: len(beginning)] == beginning


def _each_text(name: str, value: Any, kind: type[dict[str, Any]] | type[list[Any]]) -> None:
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(one, str) for one in inner):
        raise InputError(f"chat template, {name}: expected a {kind.__name__} of strings")
