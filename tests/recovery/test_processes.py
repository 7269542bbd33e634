"""Two processes that train one model: as one does, and when one of them is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxgpt import checkpoint, cli
from jaxgpt.step_folder import steps

NOISE = 5e-6
"""Relative, as of tests/test_mesh.py."""
HEARTBEAT = 10
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    words = ["data", "encode", folder / "text.txt", "--out", folder / "data", "--tokenizer", "char"]
    assert cli.main([*map(str, words), "--val-fraction", "0", "--accept"]) == 0
    return folder / "data"


def pretrain(data: Path, out: Path) -> list[str]:
    shape = ["--hidden-size", "32", "--num-attention-heads", "4", "--num-hidden-layers", "1", "--dropout", "0.1"]
    run = ["--steps", str(STEPS), "--batch-size", "8", "--sequence-length", "16", "--warmup-steps", "2"]
    saves = ["--save-every", "4", "--keep", "9", "--eval-every", "0", "--epochs", "9"]
    return ["pretrain", "--data", str(data), "--out", str(out), *shape, *run, *saves]


class Pair:
    """Two processes of four devices each, with the same command."""

    def __init__(self, out: Path, words: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = ["--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2"]
        together += ["--heartbeat-timeout", str(HEARTBEAT)]
        self.out = out
        self.told = [out.with_name(f"{out.name}-{number}.txt") for number in range(2)]
        self.running: list[subprocess.Popen[bytes]] = []
        for number, told in enumerate(self.told):
            command = [sys.executable, "-m", "jaxgpt.cli", *words, *together, "--process-id", str(number)]
            with told.open("wb") as file:
                environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
                self.running.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))

    def after(self, step: int) -> None:
        """Wait until the step is in the log."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and all(process.poll() is None for process in self.running):
            if any(record["step"] >= step for record in trained(self.out)):
                return
            time.sleep(0.05)
        raise AssertionError(self.words(0)[-2000:] + self.words(1)[-2000:])

    def codes(self, within: float) -> list[int]:
        """Exit codes, of processes that must end by themselves."""
        deadline = time.monotonic() + within
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def words(self, number: int) -> str:
        return self.told[number].read_text("utf-8", errors="replace")


def trained(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, whole) if record["event"] == "train"]


def compare(out: Path, alone: Path) -> None:
    """The same batches and, but for rounding, the same losses, each step once."""
    found, expected = trained(out), trained(alone)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one["batch_sha256"] == other["batch_sha256"]
        for what in ("loss", "grad_norm"):
            assert abs(one[what] / other[what] - 1) < NOISE, f"{what} at step {one['step']}"


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on_after_one_was_killed(data: Path, tmp_path: Path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert cli.main(pretrain(data, alone)) == 0
    first = Pair(out, [*pretrain(data, out), "--fsdp", "4"])
    first.after(6)
    first.running[1].kill()
    code, _ = first.codes(within=HEARTBEAT + 20)
    assert code in (2, -signal.SIGABRT), first.words(0)[-2000:]
    if code == 2:  # a collective failed; else JAX noticed the missing heartbeat first
        assert "jaxgpt: another process of this run is gone" in first.words(0)
    assert steps(out), "a step was saved before"
    again = Pair(out, ["pretrain", "--out", str(out), "--resume", "--tensor-parallel", "2"])
    assert again.codes(within=240) == [0, 0], again.words(0)[-2000:] + again.words(1)[-2000:]
    assert "data 4, tensor 2" in again.words(0)
    assert "resuming at step" in again.words(0)
    assert "step" not in again.words(1), "the first process alone speaks"
    compare(out, alone)
    assert checkpoint.load(out).step == STEPS


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_at_one_step_and_one_device_goes_on_from_it(data: Path, tmp_path: Path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert cli.main(pretrain(data, alone)) == 0
    pair = Pair(out, [*pretrain(data, out), "--fsdp", "8"])
    pair.after(5)
    pair.running[1].send_signal(signal.SIGTERM)
    assert pair.codes(within=60) == [130, 130], pair.words(0)[-2000:]
    assert "a signal to another process received; saving step" in pair.words(0)
    last = trained(out)[-1]["step"]
    assert steps(out)[-1] == last < STEPS
    assert cli.main(["pretrain", "--out", str(out), "--resume", "--fsdp", "1"]) == 0
    compare(out, alone)


def test_a_process_that_nobody_told_which_it_is_is_refused(data: Path, tmp_path: Path):
    command = [sys.executable, "-m", "jaxgpt.cli", *pretrain(data, tmp_path / "out"), "--distributed"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("jaxgpt: --distributed: neither Slurm, Kubernetes nor Open MPI started this process")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
