"""Conversations in files: what `generate --messages` and `/load` read."""

import json
from pathlib import Path
from typing import Any

from jaxgpt.chat import Message
from jaxgpt.errors import InputError


def read_conversations(file: str) -> list[list[Message]]:
    """The conversations of a file: JSON (messages, or an object with `messages`) or chat JSONL.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    from jaxgpt.data.episodes import read_messages

    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file} is not a file; give JSON with messages, or chat JSONL")
    value = _whole(path)
    if isinstance(value, dict):
        value = value.get("messages")
    if value is None:
        found = [messages for _, messages in read_messages([path])]
    elif isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        found = [value]
    else:
        raise InputError(f'{file} has no messages; expected [{{"role": "user", "content": "…"}}]')
    if not found:
        raise InputError(f"{file} is empty; give at least one conversation")
    return found


def _whole(path: Path) -> Any:
    """The file as one JSON value; None where it is not: then it is JSONL."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
