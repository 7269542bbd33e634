"""Where a chat template puts the contents of messages: told by contents that nobody can guess.

A text rendered with such sentinels holds no word of any user. Cut at them, what is
left is the template's own text, and each content's place is known.
"""

import re
import secrets
from collections.abc import Mapping, Sequence

from jaxgpt.chat import Message

Segment = str | int
"""Text of the template, or the index of the message whose content stands here."""

_SECRET = f"{secrets.randbelow(10**38):038d}"


def sentinel(index: int) -> str:
    """What stands for the content of a message: digits, which no trimming, quoting or change of case touches."""
    return f"{_SECRET}{index:08d}"


def with_sentinels(messages: Sequence[Message]) -> list[Message]:
    """The same conversation, each content unguessable."""
    return [Message(role=message["role"], content=sentinel(i)) for i, message in enumerate(messages)]


def cut(text: str) -> list[Segment]:
    """A text rendered with sentinels: the template's text and the places of contents, in turn; no empty text."""
    parts = re.split(f"{_SECRET}([0-9]{{8}})", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts) if part]


def joined(segments: Sequence[Segment], contents: Sequence[str]) -> str:
    """The text of the segments with these contents in their places."""
    return "".join(contents[segment] if isinstance(segment, int) else segment for segment in segments)


def missing(segments: Sequence[Segment], count: int) -> list[int]:
    """Messages among the first `count` whose content is nowhere."""
    return sorted(set(range(count)) - {segment for segment in segments if isinstance(segment, int)})


def text_after(segments: Sequence[Segment], index: int) -> str:
    """The template's text right after the last place of a content, empty if there is none."""
    after = segments[place_of(segments, index) + 1 :]
    return after[0] if after and isinstance(after[0], str) else ""


def place_of(segments: Sequence[Segment], index: int) -> int:
    """Where among the segments the content of a message stands last; ValueError where it does not."""
    return len(segments) - 1 - list(reversed(segments)).index(index)


def message_names(messages: Sequence[Mapping[str, object]], indices: Sequence[int]) -> str:
    """`message 2 (system)`, for causes."""
    return ", ".join(f"message {i + 1} ({messages[i]['role']})" for i in indices[:3])
