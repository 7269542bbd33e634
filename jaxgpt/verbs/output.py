"""Where a verb's words go: results to stdout, the rest to stderr, JSON alone where a program reads."""

import io
import json
import math
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from jaxgpt.settings import OutputSettings


@dataclass(frozen=True)
class Output:
    """What a verb prints with."""

    settings: OutputSettings
    given: tuple[str, ...]
    """Flags of the command line, for verbs that some of them make no sense to."""
    results: TextIO
    """Real stdout."""

    @classmethod
    @contextmanager
    def opened(cls, settings: OutputSettings, given: tuple[str, ...]) -> "Generator[Output]":
        """An output; with JSON, whatever else writes to stdout meanwhile lands on stderr."""
        if sys.stdout.encoding and sys.stdout.encoding.lower() != "utf-8" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        if not settings.json:
            yield cls(settings, given, sys.stdout)
            return
        with _stdout_alone() as results:
            yield cls(settings, given, results)

    @property
    def json(self) -> bool:
        """A program reads the results."""
        return self.settings.json

    @property
    def terminal(self) -> bool:
        """A person reads the results as they appear."""
        return not self.json and self.results.isatty()

    def result(self, value: Mapping[str, Any]) -> None:
        """One JSON object, on a line of its own."""
        print(json.dumps(_finite(value), ensure_ascii=False), file=self.results, flush=True)

    def say(self, text: str = "", *, end: str = "\n") -> None:
        """Text that is the result for a person; with --json it goes to stderr."""
        stream = sys.stderr if self.json else self.results
        print(printable(text) if stream.isatty() else text, end=end, file=stream, flush=True)

    def note(self, text: str) -> None:
        """A remark that is not part of the result."""
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text a terminal can show without being told anything by it: control characters become `^[` and the like."""
    return "".join(_visible(c) if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    return f"^{chr(ord(character) ^ 64)}" if ord(character) < 128 else f"\\x{ord(character):02x}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _stdout_alone() -> Generator[TextIO]:
    """Real stdout for the holder only: native code prints there too, past sys.stdout."""
    stdout = sys.stdout
    stdout.flush()
    try:
        descriptor = stdout.fileno()
    except (OSError, ValueError):  # not a real file: nothing native can reach it
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    alone = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
    os.dup2(2, descriptor)
    try:
        yield alone
        alone.flush()
    finally:
        stdout.flush()
        os.dup2(alone.fileno(), descriptor)
        with suppress(BrokenPipeError):  # raised by the flush above already
            alone.close()


@contextmanager
def waiting(what: str) -> Generator[None]:
    """Say on a terminal what takes a while, until it is done."""
    shown = f"{what} …" if sys.stderr.isatty() else ""
    print(shown, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r" + " " * len(shown) + "\r" if shown else "", end="", file=sys.stderr, flush=True)
