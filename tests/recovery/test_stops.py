"""Saves that fail and signals that come in the middle cost a run nothing."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare
from reliability_run import encode_text

from jaxgpt import checkpoint, run_log, train, training_loop
from jaxgpt.checkpoint import CheckpointError
from jaxgpt.settings import ModelSettings, PretrainSettings, TrainSettings

TRAIN = TrainSettings(
    steps=6, batch_size=2, sequence_length=16, warmup_steps=2, save_every=2, eval_every=4, eval_batches=2
)
MODEL = ModelSettings(
    preset="llama-tiny", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
)


@pytest.fixture(scope="module", autouse=True)
def _bare_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_text(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train.pretrain(settings(data, out))
    return measured(out)


def settings(data: Path, out: Path, resume: bool = False) -> PretrainSettings:
    return PretrainSettings(data=str(data), out=str(out), model=MODEL, train=TRAIN, resume=resume)


def measured(out: Path) -> list[Any]:
    """Losses and batches in the order of the log."""
    events = ("train", "eval")
    return [
        (r["event"], r["step"], r["loss"], r.get("batch_sha256")) for r in run_log.read(out) if r["event"] in events
    ]


def full(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when one of these steps is saved."""
    plain = checkpoint._require_space

    def require_space(directory: Path, contents: Any) -> None:
        if int(contents.train["1"]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(directory, contents)

    monkeypatch.setattr(checkpoint, "_require_space", require_space)


def test_every_step_logs_a_checksum_of_its_own_batch(undisturbed: list[Any]):
    batches = [batch for event, _, _, batch in undisturbed if event == "train"]
    assert len(set(batches)) == 6
    assert all(len(batch) == 16 and int(batch, 16) for batch in batches)


def test_a_save_that_fails_is_told_at_the_next_step_and_costs_nothing(
    data: Path,
    undisturbed: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    full({2}, monkeypatch)
    result = train.pretrain(settings(data, tmp_path / "run"))
    assert (result.step, result.stop_reason) == (6, "steps")
    assert measured(tmp_path / "run") == undisturbed
    assert checkpoint.steps(tmp_path / "run") == [4, 6]
    told = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert len(told) == 1
    assert told[0].startswith("step 2 was not saved: disk full (need ")
    records = run_log.read(tmp_path / "run")
    at = next(i for i, record in enumerate(records) if record["event"] == "save failed")
    assert (records[at]["step"], records[at]["reason"]) == (2, told[0])
    assert (records[at - 1]["event"], records[at - 1]["step"]) == ("train", 3)
    assert [record["step"] for record in records if record["event"] == "save"] == [4, 6]


def test_a_last_save_that_fails_is_an_error_and_resume_goes_on_from_the_one_before(
    data: Path, undisturbed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        full({6}, patch)
        with pytest.raises(CheckpointError, match=r"^step 6 was not saved: disk full .*; last good step 4$"):
            train.pretrain(settings(data, tmp_path / "run"))
    assert checkpoint.steps(tmp_path / "run") == [2, 4]
    train.pretrain(settings(data, tmp_path / "run", resume=True))
    assert measured(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_signal_in_a_validation_ends_the_run_at_once_and_resume_makes_up_for_it(
    data: Path, undisturbed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    plain, seen = training_loop.evaluate, []

    def evaluate(config: Any, params: Any, batches: Any, dtype: str, layout: Any) -> float:
        seen.append(0)
        here = len(seen) == 1 + [0, 4, 6].index(step)
        if here:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = plain(config, params, batches, dtype, layout)
        assert not here or loss != loss, "batches were measured after the signal"
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "evaluate", evaluate)
        result = train.pretrain(settings(data, tmp_path / "run"))
    assert (result.step, result.stop_reason) == (step, "signal")
    assert checkpoint.steps(tmp_path / "run")[-1] == step
    train.pretrain(settings(data, tmp_path / "run", resume=True))
    assert measured(tmp_path / "run") == undisturbed
