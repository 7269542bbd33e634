"""The child process in which imported chat templates run. Run by path, never imported.

A chat template is a program from someone else. Jinja's sandbox keeps it from objects
it should not reach, but not from looping or filling memory, and has had holes; so it
runs in a process of its own that has little memory, one second of processor time a
request, no way to open a file or start a program, and no environment. Only the
standard library and Jinja are loaded: it starts in a tenth of a second.

It reads requests from its standard input and answers on its standard output, one for
one, each a length (8 bytes) and JSON, until the input ends or its parent is gone.
The settings of Jinja are those of transformers' `apply_chat_template`.
"""

import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

# The parent says where Jinja lies: this interpreter was started without its site packages.
sys.path += sys.argv[1:]

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 1.0
MEMORY = 400 << 20
OUTPUT = 4 << 20
"""Characters that templates may write of their own a request; contents may come on top of it eight times."""
DETAIL = 300
"""Characters of a message of the template's own that are passed on."""
LOOK = 10
"""Seconds between two looks whether the parent still lives."""


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class TooLong(Exception):
    """The template wrote more than it may."""


# -- Jinja as transformers sets it up --------------------------------------------------


class Generation(Extension):
    """`{% generation %}`, by which some templates mark what was generated: here only what is inside it."""

    tags = {"generation"}  # noqa: RUF012 (as the class it extends declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope of its own, as a block that is called has."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class PlainNamespace(Namespace):
    """`namespace()` without names that begin with an underscore, by which a sandbox was left before."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _refuse_private(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


class PlainDict:
    """`dict(...)`, without the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        """A new dict."""
        return dict(*args, **values)


def _raise_exception(message: object = "") -> None:
    raise Refused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    made.filters["tojson"] = _tojson
    given: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    made.globals.update(given)
    return made


ENVIRONMENT = _environment()


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


# -- One request -----------------------------------------------------------------------


class Budget:
    """Characters that a request may still write."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, count: int) -> None:
        """Raises TooLong when nothing is left."""
        self.left -= count
        if self.left < 0:
            raise TooLong


def _answer(payload: bytes) -> bytes:
    """Of each rendering asked for its text, or `{"kind", "detail"}` of what went wrong."""
    try:
        request = json.loads(payload)
        asked = request["renderings"]
        budget = Budget(OUTPUT + 8 * sum(len(message["content"]) for one in asked for message in one["messages"]))
        return json.dumps([_rendered(request, one, budget) for one in asked]).encode()
    except TooLong:
        return json.dumps([_failure("output", "")]).encode()
    except MemoryError:
        return json.dumps([_failure("memory", "")]).encode()


def _rendered(request: Mapping[str, Any], which: Mapping[str, Any], budget: Budget) -> str | dict[str, str]:
    try:
        template = _compiled(request["source"])
        variables = {**request["variables"], "tools": None, "documents": None, **which}
        parts: list[str] = []
        for part in template.generate(**variables):
            budget.spend(len(part))
            parts.append(part)
        return "".join(parts)
    except (TooLong, MemoryError):
        raise
    except jinja2.TemplateSyntaxError as error:
        return _failure("syntax", f"line {error.lineno}: {error.message}")
    except Refused as error:
        return _failure("refused", str(error))
    except SecurityError as error:
        return _failure("forbidden", str(error))
    except RecursionError:
        return _failure("failed", "it nests or calls itself too deeply")
    except jinja2.TemplateError as error:
        return _failure("failed", str(error))
    except Exception as error:
        return _failure("failed", f"{type(error).__name__}: {error}")


def _failure(kind: str, detail: str) -> dict[str, str]:
    return {"kind": kind, "detail": detail[:DETAIL]}


# -- The process -----------------------------------------------------------------------


WARM_UP = (
    "{{ strftime_now('%c %Z') ~ 'é' | tojson }}",
    "{{ lipsum(1) }}",
    "{{ ''.__class__ }}",
    "{{ 1 // 0 }}",
    "{% if %}",
)


def _warm_up() -> None:
    """Make Python and Jinja load what they load late: time zone, codecs, the rewriting of errors."""
    for source in WARM_UP:
        asked: dict[str, Any] = {"source": source, "variables": {}, "renderings": [{"messages": []}]}
        _answer(json.dumps(asked).encode())


def _confine() -> None:
    """Give up what rendering does not need."""
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def _serve() -> None:
    parent = os.getppid()
    while (request := _receive(parent)) is not None:
        # The kernel ends the process at the limit, whatever it is doing: no handler is set.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(reply)


def _receive(parent: int) -> bytes | None:
    while not select.select([0], [], [], LOOK)[0]:
        if os.getppid() != parent:
            return None
    head = _read(8)
    return _read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def _read(count: int) -> bytes:
    """That many bytes of the standard input, fewer at its end."""
    parts: list[bytes] = []
    while count and (part := os.read(0, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(payload: bytes) -> None:
    left = memoryview(struct.pack("<Q", len(payload)) + payload)
    while left:
        left = left[os.write(1, left) :]


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent
    _warm_up()
    _confine()
    _send(b"ready")
    _serve()
