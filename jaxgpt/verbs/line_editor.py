"""The line editor of `jaxgpt chat`: history that stays, messages of several lines, commands completed."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings

from jaxgpt.stop_signals import told

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent


def history_file() -> Path:
    """Where the lines of earlier conversations are: `jaxgpt/chat_history` in the user's state folder (XDG)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "jaxgpt" / "chat_history"


def line_editor(
    commands: Mapping[str, str], settings: Mapping[str, str], status: Callable[[], str]
) -> Callable[[], str | None]:
    """A function that gives the next message, of one or several lines, or None at Ctrl-D.

    Ctrl-C takes back what is typed; leaving needs Ctrl-D, so that a Ctrl-C which comes
    just after a reply has ended loses nothing.

    Args:
        commands: those that begin with a slash, and what each is for.
        settings: names that follow `/set`, and what each is for.
        status: what stands to the right of the line.
    """
    session: PromptSession[str] = PromptSession(
        history=_History(history_file()),
        completer=_Commands(commands, settings),
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="… ",
        rprompt=status,
    )

    def next_message() -> str | None:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:
                if told():
                    raise  # a signal, no key
                print("(Ctrl-D leaves)", file=sys.stderr)
            except EOFError:
                return None

    return next_message


class _History(FileHistory):
    """A file that only its owner may read; without one, what was typed is remembered until the end."""

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        super().__init__(str(path))

    def load_history_strings(self) -> Iterable[str]:
        """The last line first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """A full disk or a folder that nobody may write to is no reason to end a conversation."""
        with suppress(OSError):
            super().store_string(string)


class _Commands(Completer):
    """Commands at the beginning of a line; names after `/set`, files after `/save` and `/load`."""

    def __init__(self, commands: Mapping[str, str], settings: Mapping[str, str]) -> None:
        self._commands = commands
        self._settings = settings

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See prompt-toolkit's `Completer`."""
        name, space, rest = document.text_before_cursor.partition(" ")
        if name in ("/save", "/load") and space:
            return PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
        if name == "/set" and space:
            return _beginning_with(rest, self._settings)
        return _beginning_with(name, self._commands) if name.startswith("/") and not space else ()


def _beginning_with(word: str, options: Mapping[str, str]) -> Iterable[Completion]:
    for option, meaning in options.items():
        if option.startswith(word):
            yield Completion(option, start_position=-len(word), display_meta=meaning)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    def enter(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    def another_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    keys.add("enter")(enter)
    keys.add("escape", "enter")(another_line)
    return keys
