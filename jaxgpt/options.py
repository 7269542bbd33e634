"""Command lines and config files from settings dataclasses.

A flag exists because a dataclass field does: its name is the field's, its help the
docstring under the field, its default the field's. Nested dataclasses are flattened
(`train.learning_rate` is `--learning-rate`). Command-line flags win over the file.
"""

import ast
import dataclasses
import difflib
import itertools
import re
import shutil
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from jaxgpt import regular_files
from jaxgpt.errors import InputError
from jaxgpt.settings import OutputSettings

Settings = TypeVar("Settings")
CONFIG = "--config"


@dataclass(frozen=True)
class Option:
    """One field that can be set."""

    path: tuple[str, ...]
    """Names from the outermost dataclass to the field."""
    owner: type
    """The dataclass that declares the field."""
    kind: type
    """str, int, float or bool: what one value is."""
    default: Any
    """`dataclasses.MISSING` where the user must give one."""
    choices: tuple[str, ...] = ()
    many: bool = False
    positional: bool = False
    """Its value needs no flag; declared by `field(metadata={"positional": True})`."""

    @property
    def name(self) -> str:
        """The field's name, which is its key in a config file."""
        return self.path[-1]

    @property
    def flag(self) -> str:
        """`--learning-rate`."""
        return "--" + self.name.replace("_", "-")

    @property
    def shown(self) -> str:
        """As help and messages name it: `--seed`, or `DIRECTORY` for a positional one."""
        return self.name.upper() if self.positional else self.flag

    @property
    def meaning(self) -> str:
        """The docstring under the field."""
        return field_docstrings(self.owner).get(self.name, "")


@dataclass(frozen=True)
class Parsed(Generic[Settings]):
    """Settings, and what the command line (not the file) said."""

    settings: Settings
    output: OutputSettings
    given: tuple[str, ...]
    """Flags that were given, in order."""


# -- Dataclasses to options ------------------------------------------------------------


def options_of(settings: type, path: tuple[str, ...] = (), defaults: Any = None) -> list[Option]:
    """Every option of a dataclass, nested ones flattened in order; names are unique."""
    hints = typing.get_type_hints(settings)
    found: list[Option] = []
    for field in dataclasses.fields(settings):
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            nested: Any = hints[field.name]
            found += options_of(nested, here, None if default is dataclasses.MISSING else default)
        else:
            found.append(_option(settings, field, hints[field.name], here, default))
    names = [option.name for option in found]
    assert len(set(names)) == len(names), f"{settings.__name__} has two options of one name: {sorted(names)}"
    return found


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _option(owner: type, field: "dataclasses.Field[Any]", hint: Any, path: tuple[str, ...], default: Any) -> Option:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        origin = typing.get_origin(hint)
    many = origin is tuple
    if many:
        hint = typing.get_args(hint)[0]
    choices = typing.get_args(hint) if origin is Literal else ()
    kind: Any = str if choices else hint
    assert kind in (str, int, float, bool), f"no option for {owner.__name__}.{field.name}: {hint}"
    positional = bool(field.metadata.get("positional"))
    return Option(path, owner, kind, default, tuple(choices), many, positional)


@cache
def field_docstrings(settings: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    file = sys.modules[settings.__module__].__file__
    assert file is not None
    tree = ast.parse(Path(file).read_text("utf-8"))
    (body,) = (n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == settings.__name__)
    found: dict[str, str] = {}
    for statement, below in itertools.pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found


# -- A command line to settings --------------------------------------------------------


def parse(settings: type[Settings], words: Sequence[str], command: str) -> Parsed[Settings]:
    """Settings from the words after the verb, and from the file that `--config` names.

    Besides the fields of `settings`, every verb takes those of `OutputSettings`.

    Raises:
        InputError: an unknown flag or key (the nearest known one is named), a value
            of the wrong type, something required that is missing, or what the
            dataclass itself refuses.
    """
    _refuse_bytes(words)
    options = _all_options(settings)
    values, config = _read_words(words, options, command)
    given = tuple(option.shown for option in options if option.path in values)
    if config is not None:
        values = read_config(config, options) | values
    missing = [o for o in options if o.default is dataclasses.MISSING and o.path not in values]
    if missing:
        first = missing[0]
        raise InputError(f"{first.shown} is missing ({first.meaning}); see `{command} --help`")
    return Parsed(_build(settings, (), values), _build(OutputSettings, ("output",), values), given)


def _refuse_bytes(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            # No provenance, log or tokenizer could hold it.
            raise InputError(f"{word!r} is not UTF-8; rename the file, or write the text in UTF-8") from None


def _all_options(settings: type) -> list[Option]:
    return [*options_of(settings), *options_of(OutputSettings, ("output",))]


def _build(settings: Any, path: tuple[str, ...], values: Mapping[tuple[str, ...], Any], base: Any = None) -> Any:
    hints = typing.get_type_hints(settings)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            default = _default(field) if base is None else getattr(base, field.name)
            default = None if default is dataclasses.MISSING else default
            changes[field.name] = _build(hints[field.name], here, values, default)
        elif here in values:
            changes[field.name] = values[here]
    return settings(**changes) if base is None else dataclasses.replace(base, **changes)


class _Words:
    """Reads a command line word by word; flags and positionals may come in any order."""

    def __init__(self, words: Sequence[str], options: Sequence[Option], command: str):
        self.words = list(words)
        self.command = command
        self.options = options
        self.flags = {option.flag: option for option in options if not option.positional}
        self.negations = {"--no-" + o.flag[2:]: o for o in self.flags.values() if o.kind is bool}
        self.values: dict[tuple[str, ...], Any] = {}
        self.config: str | None = None
        self.loose: list[str] = []

    def read(self) -> None:
        """Take every word."""
        while self.words:
            word = self.words.pop(0)
            if word == "--":
                self.loose += self.words
                break
            if _FLAG.match(word):
                self._flag(word)
            else:
                self.loose.append(word)
        self._positionals()

    def _flag(self, word: str) -> None:
        name, equals, value = word.partition("=")
        if name in self.negations or (name in self.flags and self.flags[name].kind is bool):
            option = self.negations.get(name) or self.flags[name]
            if equals:
                raise InputError(f"{name} takes no value; write {option.flag} or --no-{option.flag[2:]}")
            self.values[option.path] = name in self.flags
            return
        if name not in self.flags and name != CONFIG:
            known = [*self.flags, *self.negations, CONFIG]
            raise InputError(f"unknown flag {name}; the nearest is {nearest(name, known)}; see `{self.command} --help`")
        if not equals:
            value = self._next(name)
        if name == CONFIG:
            self.config = value
            return
        option = self.flags[name]
        parsed = from_text(option, value)
        self.values[option.path] = (*self.values.get(option.path, ()), parsed) if option.many else parsed

    def _next(self, name: str) -> str:
        following = self.words[0].partition("=")[0] if self.words else ""
        if not self.words or following in self.flags or following in self.negations or following == CONFIG:
            raise InputError(f"{name} needs a value; give one, as {name} VALUE or {name}=VALUE")
        return self.words.pop(0)

    def _positionals(self) -> None:
        for option in self.options:
            if not option.positional or not self.loose:
                continue
            if option.many:
                self.values[option.path] = tuple(from_text(option, word) for word in self.loose)
                self.loose = []
            else:
                self.values[option.path] = from_text(option, self.loose.pop(0))
        if self.loose:
            takes = " ".join(o.shown for o in self.options if o.positional) or "flags only"
            raise InputError(
                f"one argument too many: {self.loose[0]!r}; {self.command} takes {takes} (quote text with spaces)"
            )


def _read_words(
    words: Sequence[str], options: Sequence[Option], command: str
) -> tuple[dict[tuple[str, ...], Any], str | None]:
    reader = _Words(words, options, command)
    reader.read()
    return reader.values, reader.config


_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=|$)")
"""What is taken for a flag; `-5` and `- a list item` are text."""


def from_text(option: Option, text: str) -> Any:
    """One word of the command line as a value; raises InputError naming the option."""
    if option.choices:
        return _choice(option, option.shown, text)
    try:
        return option.kind(text)
    except ValueError:
        raise InputError(f"{option.shown} must be {_KINDS[option.kind]}, got {text!r}") from None


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _choice(option: Option, shown: str, value: object) -> str:
    if value not in option.choices:
        wanted = ", ".join(map(repr, option.choices)) if "" in option.choices else ", ".join(option.choices)
        raise InputError(f"{shown} must be one of {wanted}; got {value!r}")
    assert isinstance(value, str)
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`: the one it is the initials of (`lr`), or the one spelled most alike."""
    words = list(known)
    initials = [
        word for word in words if "".join(part[:1] for part in re.split("[-_]+", word.strip("-"))) == name.strip("-")
    ]
    return (initials or difflib.get_close_matches(name, words, n=1, cutoff=0.0))[0]


# -- A config file ---------------------------------------------------------------------


def read_config(file: str, options: Sequence[Option]) -> dict[tuple[str, ...], Any]:
    """Values of a TOML file, by path.

    Keys are field names, with underscores or dashes, at the top or in a table named
    after the nested dataclass (`[train]`).

    Raises:
        InputError: no such file, not TOML, an unknown key, or a value of the wrong type.
    """
    regular_files.is_there(Path(file))  # a pipe, say, is refused, not waited for
    try:
        content = tomllib.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"--config {file} cannot be read: {error.strerror}; give a TOML file") from None
    except ValueError as error:
        raise InputError(f"{file} is not TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{file} is nested too deeply to read; settings are one table deep") from None
    tables = {option.path[:-1] for option in options if len(option.path) > 1}
    values: dict[tuple[str, ...], Any] = {}
    for key, value in content.items():
        table = (key.replace("-", "_"),)
        if table in tables and isinstance(value, Mapping):
            inside = [option for option in options if option.path[:-1] == table]
            for name, inner in value.items():
                _take(values, file, name, inner, inside, f"[{key}] ")
        else:
            _take(values, file, key, value, options, "")
    return values


def _take(
    values: dict[tuple[str, ...], Any], file: str, key: str, value: object, options: Sequence[Option], table: str
) -> None:
    by_name = {option.name: option for option in options}
    name = key.replace("-", "_")
    if name not in by_name:
        raise InputError(f"{file}: unknown key {table}{key}; the nearest is {nearest(name, by_name)}")
    option = by_name[name]
    if option.path in values:
        raise InputError(f"{file}: {table}{key} is set twice; keep one")
    values[option.path] = _from_toml(option, value, f"{file}: {table}{key}")


def _from_toml(option: Option, value: object, place: str) -> Any:
    if option.many:
        if not isinstance(value, list):
            raise InputError(f"{place} must be a list of texts, got {value!r}")
        return tuple(_one_from_toml(option, item, place) for item in value)
    return _one_from_toml(option, value, place)


def _one_from_toml(option: Option, value: object, place: str) -> Any:
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{place} holds a NUL character, which no command line could; remove it")
    if option.choices:
        return _choice(option, place, value)
    if option.kind is float and type(value) is int:
        return float(value)
    if type(value) is not option.kind:
        raise InputError(f"{place} must be {_KINDS[option.kind]}, got {value!r}")
    return value


# -- Help ------------------------------------------------------------------------------


def usage(settings: type, command: str, summary: str) -> str:
    """The help text of a verb."""
    options = _all_options(settings)
    positional = [option for option in options if option.positional]
    words = [command, *map(_usage_word, positional), "[flags]"]
    lines = [f"usage: {' '.join(words)}", "", *_wrapped(summary, 0), ""]
    for option in positional:
        lines += _entry(option.shown, _explained(option))
    flags = [option for option in options if not option.positional]
    for table, group in itertools.groupby(flags, lambda option: option.path[:-1]):
        lines += ["", f"{'.'.join(table) or 'flags'}:"]
        for option in group:
            lines += _entry(_signature(option), _explained(option))
    lines += ["", "also:"]
    lines += _entry(f"{CONFIG} FILE", "TOML file with any of these settings; flags win over it")
    lines += _entry("--help", "show this and exit")
    return "\n".join(lines) + "\n"


def _usage_word(option: Option) -> str:
    word = option.shown + ("…" if option.many else "")
    return word if option.default is dataclasses.MISSING else f"[{word}]"


def _signature(option: Option) -> str:
    if option.kind is bool:
        return f"{option.flag}, --no-{option.flag[2:]}"
    if option.choices:
        return f"{option.flag} {'|'.join(choice for choice in option.choices if choice)}"
    return f"{option.flag} {'TEXT' if option.kind is str else 'N' if option.kind is int else 'X'}"


def _explained(option: Option) -> str:
    default = option.default
    if option.kind is bool or default in (dataclasses.MISSING, None, "", ()):
        return option.meaning + (" (on by default)" if default is True else "")
    shown = " ".join(default) if isinstance(default, tuple) else default
    return f"{option.meaning} (default: {shown})"


def _entry(signature: str, text: str) -> list[str]:
    indent = 30
    lines = _wrapped(text, indent)
    if len(signature) + 4 > indent:
        return [f"  {signature}", *lines]
    head = f"  {signature}".ljust(indent)
    return [head + lines[0].lstrip(), *lines[1:]] if lines else [head.rstrip()]


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(60, min(100, shutil.get_terminal_size().columns))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
