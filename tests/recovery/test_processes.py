"""Two processes that train one model: as one does, and when one of them is gone."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bare_runs
import pytest
from many_devices import HEARTBEAT, Processes, apart, trained

from jaxgpt import checkpoint, cli, heartbeat, manifest
from jaxgpt.step_folder import GOLDEN, latest, steps

pytestmark = pytest.mark.slow

NOISE = 5e-6
"""Relative, as of tests/test_mesh.py."""
STEPS = 12


class BareProcesses(Processes):
    """Without golden prompts and estimates of memory, which take each process longer than the steps."""

    program = (bare_runs.__file__,)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    words = ["data", "encode", folder / "text.txt", "--out", folder / "data", "--tokenizer", "char"]
    assert cli.main([*map(str, words), "--val-fraction", "0", "--accept"]) == 0
    return folder / "data"


def pretrain(data: Path, out: Path, steps: int = STEPS, *, init_from: Path | None = None) -> list[str]:
    shape = ["--hidden-size", "32", "--num-attention-heads", "4", "--num-hidden-layers", "1"]
    if init_from:
        shape = ["--init-from", str(init_from)]
    run = ["--steps", str(steps), "--batch-size", "8", "--sequence-length", "16", "--warmup-steps", "2"]
    saves = ["--save-every", "4", "--keep", "9", "--eval-every", "0", "--epochs", "99"]
    return ["pretrain", "--data", str(data), "--out", str(out), *shape, *run, *saves]


def compare(out: Path, alone: Path) -> None:
    """The same batches and, but for rounding, the same losses, each step once."""
    found, expected = trained(out), trained(alone)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["batch_sha256"] for record in found] == [record["batch_sha256"] for record in expected]
    for what in ("loss", "grad_norm"):
        assert apart(found, expected, what) < NOISE, what


def ended(pair: Processes, victim: int, number: signal.Signals) -> str:
    """The one line of the other process when this one gets a signal; it leaves in time, with exit code 2."""
    pair.running[victim].send_signal(number)
    began = time.monotonic()
    try:
        code = pair.running[1 - victim].wait(HEARTBEAT + 20)
    finally:
        pair.running[victim].kill()
        pair.running[victim].wait()
    words = pair.words(1 - victim)
    assert code == 2, words[-2000:]
    assert time.monotonic() - began < HEARTBEAT + 10
    # JAX's own lines may be there as well, before and after, where process 0 was killed.
    [told] = [line for line in words.splitlines() if heartbeat.AGAIN in line]
    return told


def test_two_processes_train_as_one_does_and_go_on_after_one_fell_silent(data: Path, tmp_path: Path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert cli.main(pretrain(data, alone)) == 0
    first = BareProcesses(out, [*pretrain(data, out), "--fsdp", "2"], devices=2)
    first.after(5)
    # Stopped, not killed: its connections stay, and only the heartbeat can tell.
    told = ended(first, 1, signal.SIGSTOP)
    assert told == f"jaxgpt: process 1 did not answer for {HEARTBEAT} s {heartbeat.AGAIN}"
    assert "Terminating" not in first.words(0), "JAX's own end came first"
    # The mesh stays as it was; another one goes on from such a step in the test below.
    again = BareProcesses(out, ["pretrain", "--out", str(out), "--resume"], devices=2, slurm=True)
    assert again.codes(within=240) == [0, 0], again.words(0)[-2000:] + again.words(1)[-2000:]
    assert "data 2, fsdp 2" in again.words(0)
    assert "resuming at step" in again.words(0)
    assert "step" not in again.words(1), "the first process alone speaks"
    compare(out, alone)
    assert checkpoint.load(out).step == STEPS


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_of_two_processes_is_killed_the_other_ends_with_one_line(data: Path, tmp_path: Path, victim: int):
    pair = BareProcesses(tmp_path / "out", [*pretrain(data, tmp_path / "out", 999), "--fsdp", "4"])
    pair.after(5)
    told = ended(pair, victim, signal.SIGKILL)
    # A collective may fail first, and does not know which process is missing.
    assert told.startswith((f"jaxgpt: process {victim} ", "jaxgpt: another process of this run is gone"))


@pytest.mark.exhaustive
def test_a_signal_to_one_process_ends_both_at_one_step_and_one_device_goes_on_from_it(data: Path, tmp_path: Path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert cli.main(pretrain(data, alone)) == 0
    pair = BareProcesses(out, [*pretrain(data, out), "--fsdp", "8"])
    pair.after(5)
    pair.running[1].send_signal(signal.SIGTERM)
    assert pair.codes(within=60) == [130, 130], pair.words(0)[-2000:]
    assert "a signal to another process received; saving step" in pair.words(0)
    last = trained(out)[-1]["step"]
    assert steps(out)[-1] == last < STEPS
    assert cli.main(["pretrain", "--out", str(out), "--resume", "--fsdp", "1"]) == 0
    compare(out, alone)


@pytest.mark.exhaustive
def test_two_processes_refuse_a_model_that_does_not_answer_as_it_did(data: Path, tmp_path: Path):
    base, out = tmp_path / "base", tmp_path / "out"
    assert cli.main(pretrain(data, base)) == 0
    step = latest(base)
    golden = json.loads((step / GOLDEN).read_text("utf-8"))
    golden["prompts"][0]["places"][0]["sketch"][0] += 9.0
    golden["prompts"][0]["sha256"] = "0" * 64  # or the same bits are proof enough
    (step / GOLDEN).write_text(json.dumps(golden), "utf-8")
    manifest.seal(step)
    pair = Processes(out, [*pretrain(data, out, 4, init_from=base), "--accept-loss"])
    assert pair.codes(within=120) == [0, 0], pair.words(0)[-2000:]
    shutil.rmtree(out)
    pair = Processes(out, pretrain(data, out, 4, init_from=base))
    assert pair.codes(within=120) == [2, 2], pair.words(0)[-2000:]
    for number in (0, 1):
        assert f"{step} does not answer as its golden.json says: " in pair.words(number)
    assert not out.exists()


def test_a_process_that_nobody_told_which_it_is_is_refused(data: Path, tmp_path: Path):
    command = [sys.executable, "-m", "jaxgpt.cli", *pretrain(data, tmp_path / "out"), "--distributed"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("jaxgpt: --distributed: neither Slurm, Kubernetes nor Open MPI started this process")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
