"""JSON objects of a model folder: of bounded size, and each key once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.field_checks import shortened

_LARGEST = 4 << 20
"""Bytes: an index of 25,000 tensors has half of it; as Python's objects they may be thirty times as much."""


def read(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        InputError: unreadable, no JSON object, too large, or one of its objects has a key twice.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for whoever writes into it
        raise InputError(f"{path} is a folder, pipe or device, not a file; give a folder of model files")
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise InputError(f"{path} has {size:,} bytes; of such a file at most {_LARGEST:,} are read")
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=unique(path.name))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a Hugging Face model folder") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not readable JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def unique(source: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For `json.loads`: an object whose keys are all different; other programs take one of two, we ask which."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{source} has {shortened(twice)} twice; keep one of them")
        return found

    return checked
