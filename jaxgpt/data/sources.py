"""Documents of a source: a folder, a text file, JSONL rows, or Python's own standard library."""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxgpt.errors import InputError

STDLIB = "stdlib"
"""The source that every machine has; write `./stdlib` for a folder of that name."""

MAX_LINE = 64 * 2**20
"""Bytes of the longest JSONL row that is read; a longer one is a broken file, not a document."""

_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text. Tokens of different documents never predict each other."""

    name: str
    """Path relative to the source, with `:line` for a JSONL row; decides the held-out split."""
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file of a folder that holds no text."""

    name: str
    reason: str


@dataclass(frozen=True)
class File:
    """A file that may hold documents."""

    path: Path
    name: str
    """Relative to the source, with forward slashes."""
    found: bool = True
    """Found in a folder rather than named by the user: skipped, not refused, if it is no text."""


def documents(source: str | Path) -> Iterator[Document]:
    """The documents of `source`, in a fixed order.

    `source` is `stdlib`, a folder (every file below it that is UTF-8 text; hidden
    ones are left out; `.jsonl` files give one document a row), a `.jsonl` file
    whose rows have a `text` key, or one text file.

    Raises:
        InputError: the source does not exist, or a row of JSONL is malformed.
    """
    for file in files(source):
        for document in read(file):
            if isinstance(document, Document):
                yield document


def files(source: str | Path) -> list[File]:
    """The files of `source`, sorted by relative path; raises InputError if there are none."""
    if source == STDLIB:
        folder = Path(sysconfig.get_paths()["stdlib"])
        found = [f for f in _walk(folder, _NOT_CORPUS) if f.name.endswith(".py")]
    else:
        folder = Path(source)
        if folder.is_file():
            return [File(folder, folder.name, found=False)]
        if not folder.is_dir():
            what = "is a pipe or device, and text is read more than once" if folder.exists() else "does not exist"
            raise InputError(f"{source} {what}; give a folder, a text or .jsonl file, or `{STDLIB}`")
        found = list(_walk(folder, set()))
    if not found:
        raise InputError(f"{source} holds no files; give a folder with text in it")
    return sorted(found, key=lambda file: file.name)


def _walk(folder: Path, excluded: set[str]) -> Iterator[File]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield File(path, path.relative_to(folder).as_posix())


def read(file: File) -> Iterator[Document | Skipped]:
    """The documents of one file; an empty text is skipped.

    Raises:
        InputError: the file cannot be opened; or it was named by the user and is no
            text; or a row of JSONL is malformed.
    """
    if file.path.suffix == ".jsonl":
        yield from _rows_with_text(file)
        return
    with opened(file.path) as stream:
        content = stream.read()
    text, reason = _decoded(content)
    if reason and not file.found:
        raise InputError(f"{file.path} is not UTF-8 text ({reason}); convert it first")
    yield Document(file.name, text) if text else Skipped(file.name, reason or "empty")


def opened(path: Path) -> BinaryIO:
    """The file, open for reading; raises InputError with the system's reason if it cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); leave it out or make it readable") from None


def _decoded(content: bytes) -> tuple[str, str]:
    """(text, ""), or ("", why it is none)."""
    if b"\0" in content:
        return "", f"NUL at byte {content.index(0)}"
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"0x{content[error.start]:02x} at byte {error.start}"


def _rows_with_text(file: File) -> Iterator[Document | Skipped]:
    for place, row in json_rows(file.path):
        name = f"{file.name}:{place.rpartition(':')[2]}"
        text = row.get("text")
        if "messages" in row and text is None:
            raise InputError(f"{place} has `messages`, expected `text`; chats are for `jaxgpt sft`, not for encoding")
        if not isinstance(text, str):
            got = "no key `text`" if "text" not in row else f"`text` of type {type(text).__name__}"
            raise InputError(f"{place} has {got}, expected a string; repair or remove the row")
        check_unicode(text, place)
        yield Document(name, text) if text else Skipped(name, "empty")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of each row of a JSONL file; blank lines are passed over.

    Raises:
        InputError: a row is not a JSON object in UTF-8, or longer than MAX_LINE.
    """
    with opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise InputError(f"{place} is longer than {MAX_LINE >> 20} MiB; JSONL has one row a line")
            if line.strip():
                yield place, _json_object(line, place)


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 (0x{line[error.start]:02x} at byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{place} is nested too deeply to read; repair or remove the row") from None
    except ValueError as error:
        raise InputError(f"{place} is not JSON ({_one_line(error)}); repair or remove the row") from None
    if not isinstance(row, dict):
        raise InputError(f'{place} is a JSON {type(row).__name__}, expected an object such as {{"text": ...}}')
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def check_unicode(text: str, place: str) -> None:
    """Refuse lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{place} is not valid Unicode at character {error.start} ({code})") from None
