"""Wrong text sides that nobody repairs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.chat import Message, Rendered
from oracle.text import Text, render

LONGEST = 12
"""Ids."""


def cut_off(text: Text) -> Mapping[str, Any]:
    """Ids beyond a maximal length are dropped without a word."""
    return {"encode": lambda string: text.encode(string)[:LONGEST]}


def spaces_cleaned_up(text: Text) -> Mapping[str, Any]:
    """No space is left in front of punctuation (clean_up_tokenization_spaces)."""
    return {"decode": lambda ids: re.sub(r" (?=[.,?!])", "", text.decode(ids))}


def one_before_trained(text: Text, messages: Sequence[Message]) -> Rendered:
    """The last token of a reply's header is trained as part of the reply."""
    right = render(text, messages)
    following = [*right.mask[1:], 0]
    return Rendered(right.ids, [here | after for here, after in zip(right.mask, following, strict=True)])
