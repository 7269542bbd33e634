"""The conversation at the terminal: lines in, replies out, commands that begin with a slash."""

import dataclasses
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt import options
from jaxgpt.errors import InputError
from jaxgpt.settings import GenerationSettings
from jaxgpt.verbs.conversations import read_conversations
from jaxgpt.verbs.output import Output

if TYPE_CHECKING:
    from jaxgpt.chat_session import ChatSession
    from jaxgpt.lm import Piece

COMMANDS = {
    "/regen": "the last reply again, with the next seed",
    "/system": "[TEXT]  start over, with this system message or none",
    "/set": "[NAME VALUE]  show or change how replies are generated, as in /set temperature 0.8",
    "/save": "FILE  write the conversation as JSON",
    "/load": "FILE  go on with a saved conversation",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
}
_COMMAND = re.compile(r"/[a-z]+")


class Repl:
    """Reads a line, answers it, until there are no more."""

    def __init__(self, session: "ChatSession", output: Output):
        self.session = session
        self.output = output
        self.own_files: set[Path] = set()
        """Saved or loaded here, so /save may write them again."""
        self.read_line = _line_reader(session)

    def run(self) -> int:
        """Until /quit or the end of the input."""
        if sys.stdin.isatty():
            how = "chat" if self.session.template else "raw continuation of text"
            self.output.note(f"{how}; /help lists commands and keys, Ctrl-C stops a reply, Ctrl-D leaves")
        while True:
            try:
                line = self.read_line()
                if line is None or self._take(line):
                    break
            except InputError as error:
                self.output.note(f"jaxgpt: {error}")
        return 0

    def _take(self, line: str) -> bool:
        """Answer one line; True to leave."""
        name, _, rest = line.partition(" ")
        if not _COMMAND.fullmatch(name):
            if line.strip() or not self.session.template:
                self._answer(self.session.send(line.removeprefix(" ") if line.startswith(" /") else line))
            return False
        if name not in COMMANDS:
            near = options.nearest(name, COMMANDS)
            raise InputError(f"unknown command {name}; the nearest is {near}; a space before it makes it a message")
        if name == "/quit":
            return True
        actions: dict[str, Callable[[str], None]] = {
            "/regen": self._regenerate,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
        }
        actions[name](rest.strip())
        return False

    # -- Replies -------------------------------------------------------------------------

    def _answer(self, pieces: "Generator[Piece]") -> None:
        from jaxgpt.verbs.talk import reply

        with _interrupts() as interrupted:
            reason = reply(_until(pieces, interrupted), self.output)
        if interrupted:
            self.output.note("(stopped)")
        elif reason == "length":
            self.output.note("(cut: max_new_tokens or the context was reached)")
        room, limit = self.session.room, self.session.limit
        if room < self.session.settings.max_new_tokens:
            self.output.note(
                f"({max(room, 0):,} of {limit:,} tokens are left in this conversation; /system starts over)"
            )

    # -- Commands ------------------------------------------------------------------------

    def _regenerate(self, rest: str) -> None:
        settings = self.session.settings
        if not self.session.has_reply:
            raise InputError("there is no reply to generate again; send a message first")
        if settings.temperature <= 0:
            self.output.note("(greedy: the reply will be the same; /set temperature 0.8 changes that)")
        self.session.configure(dataclasses.replace(settings, seed=(settings.seed + 1) % 2**32))
        self._answer(self.session.regenerate())

    def _system(self, text: str) -> None:
        if text and not self.session.template:
            raise InputError("a system message needs the chat template; start with --chat")
        self.session.restart(text or None)
        self.output.note("(new conversation)")

    def _set(self, rest: str) -> None:
        from jaxgpt.verbs.talk import note_ignored

        known = {option.name: option for option in options.options_of(GenerationSettings)}
        name, _, value = rest.partition(" ")
        name = name.replace("-", "_")
        if name and name not in known:
            raise InputError(f"unknown setting {name}; the nearest is {options.nearest(name, known)}")
        if name and not value:
            raise InputError(f"/set {name} needs a value ({known[name].meaning})")
        if name:
            parsed: Any = options.from_text(known[name], value.strip())
            changes = {name: (parsed,) if known[name].many else parsed}
            self.session.configure(dataclasses.replace(self.session.settings, **changes))
            note_ignored(self.session.settings, self.output)
        shown = dataclasses.asdict(self.session.settings)
        self.output.note("  ".join(f"{key}={value!r}" for key, value in shown.items()))

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        if not self.session.messages:
            raise InputError("nothing was said yet, so there is nothing to save")
        if path.exists() and path.resolve() not in self.own_files:
            raise InputError(f"{path} exists; choose another name")
        text = json.dumps({"messages": self.session.messages}, ensure_ascii=False) + "\n"
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; choose another place") from None
        self.own_files.add(path.resolve())
        self.output.note(f"(saved {len(self.session.messages)} messages in {path})")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        conversations = read_conversations(str(path))
        if len(conversations) > 1:
            raise InputError(f"{path} holds {len(conversations)} conversations; give a file with one")
        self.session.load(conversations[0])
        self.own_files.add(path.resolve())
        self.output.note(f"({len(self.session.messages)} messages, {len(self.session.ids):,} tokens)")

    def _help(self, rest: str) -> None:
        for name, meaning in COMMANDS.items():
            self.output.note(f"  {name} {meaning}")
        if sys.stdin.isatty():
            self.output.note("  Enter sends; Alt-Enter, or a backslash before Enter, begins another line")


def _path(text: str, command: str) -> Path:
    if not text:
        raise InputError(f"{command} needs a file name")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{text}: that user has no home folder here; write the folder itself") from None


def _line_reader(session: "ChatSession") -> Callable[[], str | None]:
    """The next message without its line break; None at the end."""
    if sys.stdin is None:
        raise InputError("standard input is closed; give it lines to answer, or --message TEXT")
    if sys.stdin.isatty() and sys.stdout.isatty():
        from jaxgpt.verbs.line_editor import line_editor

        settings = {option.name: option.meaning for option in options.options_of(GenerationSettings)}
        return line_editor(COMMANDS, settings, lambda: f"{max(session.room, 0):,} tokens left")

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")

    def plain() -> str | None:
        line = sys.stdin.readline()
        # Undecodable bytes arrive as lone surrogates, whatever the locale: the session names them.
        return line.rstrip("\r\n") if line else None

    return plain


@contextmanager
def _interrupts() -> Generator[list[bool]]:
    """Ctrl-C fills the list, once: an exception could strike between two updates of the cache."""
    interrupted: list[bool] = []

    def note(number: int, frame: object) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: Ctrl-C goes elsewhere
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _until(pieces: "Generator[Piece]", interrupted: list[bool]) -> "Generator[Piece]":
    """The pieces up to Ctrl-C; the reply is closed properly however it ends."""
    try:
        for piece in pieces:
            yield piece
            if interrupted:
                break
    finally:
        pieces.close()
