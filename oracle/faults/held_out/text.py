"""Wrong text sides that nobody repairs."""

import re
from collections.abc import Mapping
from typing import Any

from oracle.text import Text

LONGEST = 12
"""Ids."""


def cut_off(text: Text) -> Mapping[str, Any]:
    """Ids beyond a maximal length are dropped without a word."""
    return {"encode": lambda string: text.encode(string)[:LONGEST]}


def spaces_cleaned_up(text: Text) -> Mapping[str, Any]:
    """No space is left in front of punctuation (clean_up_tokenization_spaces)."""
    return {"decode": lambda ids: re.sub(r" (?=[.,?!])", "", text.decode(ids))}
