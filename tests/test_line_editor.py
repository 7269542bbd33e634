"""The line editor of a conversation, typed into through a pipe."""

import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from jaxgpt.stop_signals import interrupting
from jaxgpt.verbs import line_editor as editing
from jaxgpt.verbs.line_editor import line_editor

COMMANDS = {"/set": "change", "/save": "write", "/system": "start over"}
SETTINGS = {"temperature": "how random", "top_k": "how many", "top_p": "how much"}


@pytest.fixture
def keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[PipeInput]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def typed(keyboard: PipeInput, keys: str) -> str | None:
    keyboard.send_text(keys)
    return line_editor(COMMANDS, SETTINGS, lambda: "9 tokens left")()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("def f():\x1b\r    return 1\r", "def f():\n    return 1"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("a \\ in the middle\r", "a \\ in the middle"),
        ("\x1b[200~pasted\nlines\x1b[201~\r", "pasted\nlines"),
        ("\x04", None),
    ],
)
def test_enter_sends_and_a_message_may_have_several_lines(keyboard: PipeInput, keys: str, message: str | None):
    assert typed(keyboard, keys) == message


def test_ctrl_c_takes_back_what_is_typed_and_does_not_leave(
    keyboard: PipeInput, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prompts = iter([KeyboardInterrupt, "again", EOFError])

    def prompt(self: object, text: str) -> str:
        found = next(prompts)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr(editing.PromptSession, "prompt", prompt)
    next_message = line_editor(COMMANDS, SETTINGS, str)
    assert next_message() == "again"
    assert capsys.readouterr().err == "(Ctrl-D leaves)\n"
    assert next_message() is None


def test_a_signal_at_the_prompt_leaves(keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(editing.PromptSession, "prompt", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), interrupting():
        line_editor(COMMANDS, SETTINGS, str)()


def test_what_was_typed_is_there_the_next_time_for_its_owner_alone(keyboard: PipeInput):
    assert typed(keyboard, "two\x1b\rlines\r") == "two\nlines"
    assert editing.history_file().stat().st_mode & 0o777 == 0o600
    assert editing._History(editing.history_file()).load_history_strings() == ["two\nlines"]


@pytest.mark.parametrize("place", ["a file in the way of the folder", "a folder in the way of the file"])
def test_a_history_that_cannot_be_kept_ends_no_conversation(keyboard: PipeInput, place: str, tmp_path: Path):
    if place == "a file in the way of the folder":
        (tmp_path / "state").write_text("")
    else:
        editing.history_file().mkdir(parents=True)
    assert typed(keyboard, "hello\r") == "hello"
    assert typed(keyboard, "more\r") == "more"


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("/s", ["/set", "/save", "/system"]),
        ("/sy", ["/system"]),
        ("/set top", ["top_k", "top_p"]),
        ("/system be ", []),
        ("hello /s", []),
        ("", []),
    ],
)
def test_commands_and_settings_are_completed_where_they_belong(text: str, offered: list[str]):
    found = editing._Commands(COMMANDS, SETTINGS).get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in found] == offered


def test_files_are_completed_after_save(tmp_path: Path):
    (tmp_path / "talk.json").write_text("{}")
    found = editing._Commands(COMMANDS, SETTINGS).get_completions(Document(f"/save {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in found] == ["lk.json"]
