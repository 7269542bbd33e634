"""One command at a time fills a folder, and what failed leaves nothing that the next one trips over."""

import dataclasses
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CONFIGS, random_params

from jaxgpt import checkpoint, domain_tokens
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Contents
from jaxgpt.errors import InputError
from jaxgpt.formats import hf, importing
from jaxgpt.run_lock import RunLock, filling
from jaxgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, and beside it `hf`, its export."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=["hello"])
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=tokenizer.model_vocab_size)
    contents = Contents(
        config=config, params=random_params(config), stage="base", compute_dtype="float32", eos_token_ids=[],
        tokenizer=tokenizer, template=None, provenance={},
    )  # fmt: skip
    checkpoint.save(folder / "run", 4, contents).result()
    hf.write(checkpoint.load(folder / "run"), folder / "hf")
    return folder / "run"


Fill = Callable[[Path, Path], None]


def imported(run: Path, out: Path) -> None:
    importing.import_model(run.with_name("hf"), out, golden=False)


def added(run: Path, out: Path) -> None:
    domain_tokens.add(run, out, ["<MUL_2_3>"])


@pytest.mark.parametrize("fill", [imported, added])
def test_a_folder_that_another_command_fills_is_refused_and_a_failed_ones_leftovers_are_not(
    run: Path, tmp_path: Path, fill: Fill
):
    out = tmp_path / "out"
    leftover = out / ".step-00000000.partial.orbax-checkpoint-tmp"
    with RunLock(out) as lock:
        lock.acquire()
        leftover.mkdir()
        with pytest.raises(InputError, match=r"another run is writing into .*out; wait for it"):
            fill(run, out)
        assert leftover.exists()
    fill(run, out)
    assert [path.name[:5] for path in out.iterdir()] == ["step-"]
    with pytest.raises(InputError, match="out exists and is not an empty folder; choose another"):
        fill(run, out)


@pytest.mark.parametrize("fill", [imported, added])
def test_what_came_while_the_source_was_read_is_seen_under_the_lock(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Fill
):
    out = tmp_path / "out"
    acquire = RunLock.acquire

    def late(self: RunLock) -> None:
        acquire(self)
        (out / "step-00000009").mkdir()

    monkeypatch.setattr(RunLock, "acquire", late)
    with pytest.raises(InputError, match="out exists and is not an empty folder; choose another"):
        fill(run, out)
    assert [path.name for path in out.iterdir()] == ["step-00000009"]


def test_a_folder_in_which_nothing_was_saved_goes_again(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), filling(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_is_written_to_nonetheless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(number: int):
        def flock(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with filling(tmp_path / "a"):
        (tmp_path / "a/step-00000000").mkdir()
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), filling(tmp_path / "b"):
        pass
