"""The candidate's text side: how it turns text and conversations into ids, as fields that a fault can be planted in.

By default every field is the product's own. `render`, `prompt` and `parse` are given
the whole text side and take `encode` and `specials` from it, so that a change of
those two reaches everything that is built on them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from jaxgpt import chat
from jaxgpt.chat import Message, Rendered, Template
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError
from jaxgpt.lm import LM
from jaxgpt.tokenizer import Special, Tokenizer


@dataclass(frozen=True)
class Text:
    """Tokenizer, template and what surrounds them."""

    saved: Mapping[str, Any]
    """The checkpoint's `tokenizer_state.json` as it lies there: what the fields below are compared with."""
    saved_template: Mapping[str, Any] | None
    """The checkpoint's `template.json`, likewise."""
    encode: Callable[[str], list[int]]
    """Ids of ordinary text, whatever it looks like: what people type and corpora hold."""
    decode: Callable[[Sequence[int]], str]
    """Text of ids, special tokens spelled out."""
    specials: Mapping[str, Special]
    """By name: string and id."""
    template: Template | None
    """What goes around each turn of a conversation: written down, or an imported program."""
    stop_ids: tuple[int, ...]
    """Ids that end a reply."""
    bos_ids: tuple[int, ...]
    """What the vocabulary is made to put before every text."""
    parse: "Callable[[Text, str], list[int]]"
    """Ids of text in which the strings of special tokens stand for them."""
    render: "Callable[[Text, Sequence[Message]], Rendered]"
    """Ids and loss mask of a conversation; `template` is not None."""
    prompt: "Callable[[Text, str], list[int]]"
    """What the model is fed for a raw text: the text's ids, and the policy of what goes before them (BOS)."""

    @classmethod
    def of(cls, loaded: Checkpoint) -> "Text | None":
        """The text side of a checkpoint; None if it has no tokenizer."""
        if loaded.tokenizer is None:
            return None
        tokenizer = loaded.tokenizer
        template = loaded.template
        saved = _json(loaded.path / "tokenizer_state.json")
        return cls(
            saved=tokenizer.state() if saved is None else saved,
            saved_template=None if template is None else _json(loaded.path / "template.json") or template.to_dict(),
            encode=tokenizer.encode,
            decode=tokenizer.decode,
            specials={special.name: special for special in tokenizer.specials},
            template=template,
            stop_ids=_Prompts(tokenizer, template).stops(loaded),
            bos_ids=tokenizer.bos_ids,
            parse=partial(parse, tokenizer),
            render=render,
            prompt=prompt,
        )


def parse(tokenizer: Tokenizer, text: Text, string: str) -> list[int]:
    """The product's longest match, with the ids that the text side gives the special tokens it finds."""
    named = {special.id: text.specials.get(special.name, special).id for special in tokenizer.specials}
    return [named.get(id, id) for id in tokenizer.encode(string, specials=True)]


def render(text: Text, messages: Sequence[Message]) -> Rendered:
    """The product's `chat.render`."""
    assert text.template is not None
    return chat.render(messages, _view(text), text.template)


def prompt(text: Text, string: str) -> list[int]:
    """The product's `LM.encode`."""
    return _Prompts(_view(text), text.template).encode(string)


# -- The product's code on an altered text side ----------------------------------------


class _View:
    """A text side where the product expects a Tokenizer."""

    def __init__(self, text: Text):
        self._text = text

    def encode(self, string: str, *, specials: bool = False) -> list[int]:
        return self._text.parse(self._text, string) if specials else self._text.encode(string)

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(ids)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return self._text.bos_ids

    def special(self, name: str) -> Special:
        if name not in self._text.specials:
            raise InputError(f"tokenizer has no special token {name!r}")
        return self._text.specials[name]


def _view(text: Text) -> Tokenizer:
    return cast(Tokenizer, _View(text))


class _Prompts(LM):
    """The product's rules for prompts and stop ids, without a model."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None):
        self.tokenizer, self.template = tokenizer, template

    def stops(self, loaded: Checkpoint) -> tuple[int, ...]:
        """Ids at which generation stops."""
        return self._stop_ids(loaded)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
