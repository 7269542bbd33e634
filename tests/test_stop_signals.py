"""Signals that end a command: each is heeded once, whatever was going on when it came."""

import gc
import signal
import sys
import time
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path

import pytest

from jaxgpt import stop_signals
from jaxgpt.stop_signals import StopSignals, interrupting, told

pytestmark = pytest.mark.slow

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PATIENCE = 10.0
"""Seconds until an interrupt that does not come is missed."""


@pytest.fixture
def ignored() -> Generator[Callable[[signal.Signals], None]]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield lambda number: signal.signal(number, signal.SIG_IGN) and None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_each_ends_what_has_nothing_to_save_and_leaves_no_trace(number: signal.Signals):
    before, hook = [signal.getsignal(each) for each in ENDING], sys.unraisablehook
    with interrupting():
        assert told() == ""
        with pytest.raises(KeyboardInterrupt), interrupting():
            signal.raise_signal(number)
        assert told() == number.name
    assert told() == ""
    assert ([signal.getsignal(each) for each in ENDING], sys.unraisablehook) == (before, hook)


@pytest.mark.parametrize("number", ENDING)
def test_one_that_was_ignored_stays_ignored(number: signal.Signals, ignored: Callable[[signal.Signals], None]):
    ignored(number)
    stops = StopSignals()
    with interrupting():
        signal.raise_signal(number)
        with stops.watched():
            signal.raise_signal(number)
        assert (told(), stops.by) == ("", "")


@pytest.mark.parametrize("number", ENDING)
def test_a_run_that_is_watched_goes_on_to_its_next_step(number: signal.Signals):
    stops = StopSignals()
    with interrupting(), stops.watched():
        signal.raise_signal(number)
    assert (stops.by, stops.told()) == (number.name, True)


def in_the_garbage_collector(number: signal.Signals) -> None:
    """A signal while a callback runs whose exceptions go nowhere."""

    def callback(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    gc.callbacks.append(callback)
    gc.collect()


@pytest.mark.parametrize("number", ENDING)
def test_one_whose_interrupt_was_swallowed_interrupts_again(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    with interrupting():
        in_the_garbage_collector(number)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(PATIENCE)
    assert capfd.readouterr().err == ""


def test_a_run_that_begins_after_one_was_swallowed_knows_of_it():
    stops = StopSignals()
    with interrupting():
        in_the_garbage_collector(signal.SIGINT)
        with stops.watched():
            assert stops.by == "SIGINT"
            time.sleep(3 * stop_signals._AGAIN)  # a second SIGINT would end the run without a save


def test_an_import_is_not_interrupted_but_ends_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "half_imported.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.5)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with interrupting():
        assert import_module("half_imported").whole
        with pytest.raises(KeyboardInterrupt):
            time.sleep(PATIENCE)
    del sys.modules["half_imported"]


def test_cleaning_up_is_interrupted_by_ctrl_c_alone():
    with interrupting():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_exceptions_that_go_nowhere_are_told_as_ever(monkeypatch: pytest.MonkeyPatch):
    heard: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: heard.append(ignored.exc_type))

    class Dropped:
        def __del__(self) -> None:
            raise ZeroDivisionError

    with interrupting():
        Dropped()
    assert heard == [ZeroDivisionError]
