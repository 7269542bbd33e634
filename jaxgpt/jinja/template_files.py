"""Where a Hugging Face folder keeps its chat templates, and what they may use.

`chat_template.jinja` and `additional_chat_templates/*.jinja` come before the entry
`chat_template` of tokenizer_config.json, one template or a list of named ones, as
transformers reads them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.jinja.template import DEFAULT, JinjaTemplate, Placed
from jaxgpt.regular_files import is_there

FILE, FOLDER, SUFFIX = "chat_template.jinja", "additional_chat_templates", ".jinja"
CONFIG, SPECIALS_MAP = "tokenizer_config.json", "special_tokens_map.json"
LONGEST = 1 << 20
"""Characters of all templates together; the longest in use have some 20,000."""
MOST = 32
"""Templates in a folder."""
VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class FoundTemplate:
    """What lies in a folder, before anything of it was rendered."""

    sources: Mapping[str, str]
    placed: Placed
    variables: Mapping[str, str]


def find(folder: Path) -> FoundTemplate | None:
    """The chat templates of a folder, if it has any.

    Raises:
        InputError: they are not text, not named, or absurdly long.
    """
    config = _object(folder / CONFIG)
    in_files = _files(folder)
    sources, placed = (in_files, "files") if in_files else _entry(config.get("chat_template"))
    if not sources:
        return None
    if len(sources) > MOST or sum(map(len, sources.values())) > LONGEST:
        raise InputError(f"chat templates of {folder} are longer than {LONGEST:,} characters, or more than {MOST}")
    return FoundTemplate(sources, placed, _variables(config, _object(folder / SPECIALS_MAP)))


def _files(folder: Path) -> dict[str, str]:
    found = {DEFAULT: folder / FILE} if is_there(folder / FILE) else {}
    extra = folder / FOLDER
    if extra.is_dir():
        found |= {path.name.removesuffix(SUFFIX): path for path in sorted(extra.glob(f"*{SUFFIX}"))[: MOST + 1]}
    return {name: _text(path) for name, path in found.items() if is_there(path)}


def _text(path: Path) -> str:
    try:
        # Line breaks are kept, so that what is exported is what was imported.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as UTF-8 text: {type(error).__name__}") from None


def _entry(entry: Any) -> tuple[dict[str, str], Placed]:
    if entry is None:
        return {}, "config"
    if isinstance(entry, str):
        return {DEFAULT: entry}, "config"
    named: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {}
    for one in entry if isinstance(entry, list) else []:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or one["name"] in named:
            raise InputError(f"{CONFIG}: chat_template must be a list of templates with different names")
        named[one["name"]] = one.get("template")
    if not named or not all(isinstance(source, str) for source in named.values()):
        raise InputError(f"{CONFIG}: chat_template must be a string or a list of objects with name and template")
    return named, "config list"


def _variables(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Of the special tokens that have a name, their strings; older files note them in a file of their own."""
    more = config.get("extra_special_tokens")
    values = {**{name: older.get(name) for name in VARIABLES}, **(more if isinstance(more, dict) else {})}
    values |= {name: config[name] for name in VARIABLES if config.get(name) is not None}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _object(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} is not readable JSON") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object")
    return found


def write(template: JinjaTemplate, folder: Path) -> dict[str, Any]:
    """Put the templates back where they were; what belongs into tokenizer_config.json is returned.

    Returns:
        `{"chat_template": …}`, or nothing where they are files.

    Raises:
        InputError: a name that is no file name.
    """
    if template.placed == "config":
        return {"chat_template": template.source}
    if template.placed == "config list":
        return {"chat_template": [{"name": name, "template": source} for name, source in template.sources.items()]}
    for name, source in template.sources.items():
        if Path(name).name != name or "\0" in name:
            raise InputError(f"chat template is named {name!r}, outside the folder; refused")
        path = folder / FILE if name == DEFAULT else folder / FOLDER / f"{name}{SUFFIX}"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(source)
    return {}
