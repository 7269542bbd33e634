"""Bars are drawn on a terminal, and nowhere else."""

import io

import pytest

from jaxgpt.verbs.progress import bytes_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_bytes_and_names_that_steer_nothing(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with bytes_bar("a/[red]b\x1b[2J") as progress:
        assert progress is not None
        progress(500_000, 1_000_000)
    assert "a/[red]b^[[2J" in screen.getvalue()
    assert "0.5/1.0 MB" in screen.getvalue()


def test_a_file_gets_no_bar(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with bytes_bar("importing") as progress:
        assert progress is None
    assert screen.getvalue() == ""
