"""What another program's files say of tokens, after some of them became content."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from jaxgpt.vocabularies.vocabulary_files import JSON, NAMED, SETTINGS, SPECIAL_MAP


def as_content(files: Mapping[str, str], texts: Collection[str]) -> dict[str, str]:
    """The files, name to text, that call none of these tokens special any more; other files stay word for word.

    Otherwise transformers would make them special again, and leave them out of what it decodes.
    """
    changed = dict(files)
    for name in {JSON, SETTINGS, SPECIAL_MAP} & files.keys():
        before = json.loads(files[name])
        after = _without(before, texts)
        if after != before:
            changed[name] = json.dumps(after, ensure_ascii=False, indent=2) + "\n"
    return changed


def _without(content: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    kept = {key: value for key, value in content.items() if key not in NAMED or _text(value) not in texts}
    for key in {"additional_special_tokens", "extra_special_tokens"} & kept.keys():
        if isinstance(kept[key], list):
            kept[key] = [value for value in kept[key] if _text(value) not in texts]
        elif isinstance(kept[key], dict):
            kept[key] = {role: value for role, value in kept[key].items() if _text(value) not in texts}
    if "added_tokens" in kept:
        kept["added_tokens"] = [_plain(note, texts) for note in kept["added_tokens"] or []]
    if "added_tokens_decoder" in kept:
        kept["added_tokens_decoder"] = {
            id: _plain(note, texts) for id, note in (kept["added_tokens_decoder"] or {}).items()
        }
    return kept


def _text(value: Any) -> Any:
    """A token is noted by its string, or as an object with its flags."""
    return value.get("content") if isinstance(value, dict) else value


def _plain(note: dict[str, Any], texts: Collection[str]) -> dict[str, Any]:
    return {**note, "special": False} if note["content"] in texts else note
