"""One run on one device, on eight in one process, and on four in each of two: are the losses the same?

    python scripts/many_devices.py [--steps 20] [--out DIRECTORY]

The devices are virtual ones of the CPU, so nothing here says how fast anything is. What
rounding alone does to a loss is measured too: one device, with the rows of a batch in two
halves. Then one of two processes is killed or stopped, and the run is started again.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEARTBEAT = 6
"""Seconds after which a silent process counts as dead."""


class Processes:
    """Processes with the same command, four devices each; every one is told who it is, or finds it out."""

    program: tuple[str, ...] = ("-m", "jaxgpt.cli")
    """What Python is told to run; tests have another."""

    def __init__(self, out: Path, words: Sequence[str], *, count: int = 2, devices: int = 4, slurm: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out = out
        self.told = [out.with_name(f"{out.name}-{number}.txt") for number in range(count)]
        self.running: list[subprocess.Popen[bytes]] = []
        for number, told in enumerate(self.told):
            command = [sys.executable, *self.program, *words]
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
            if count > 1:
                command += ["--distributed", "--heartbeat-timeout", str(HEARTBEAT)]
            if count > 1 and not slurm:
                command += ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(count)]
                command += ["--process-id", str(number)]
            if slurm:
                environment |= as_slurm(number, count, port)
            with told.open("wb") as file:
                self.running.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))

    def after(self, step: int) -> None:
        """Wait until the step is in the log and one is saved; raises AssertionError where that does not come."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and all(process.poll() is None for process in self.running):
            # Saves are asynchronous: the log may be ahead.
            if any(record["step"] >= step for record in trained(self.out)) and any(self.out.glob("step-*")):
                return
            time.sleep(0.02)
        raise AssertionError(f"no step {step}: {self.words(0)[-2000:]}")

    def codes(self, within: float) -> list[int]:
        """Exit codes, of processes that must end by themselves."""
        deadline = time.monotonic() + within
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def words(self, number: int) -> str:
        """What one of them printed."""
        return self.told[number].read_text("utf-8", errors="replace")


def as_slurm(number: int, count: int, port: int) -> dict[str, str]:
    """What srun sets for one of the tasks on one node."""
    task = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NTASKS": str(count)}
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    # JAX makes the port of the job's number, which two such runs would share.
    return {**task, **job, "JAX_COORDINATOR_PORT": str(port)}


def trained(out: Path) -> list[dict[str, Any]]:
    """The whole lines of steps in a run's log."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, whole) if record["event"] == "train"]


def apart(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], what: str = "loss") -> float:
    """Largest relative difference over the same steps; raises AssertionError where a step is missing or there twice."""
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    return max(abs(one[what] / other[what] - 1) for one, other in zip(found, expected, strict=True))


def encoded(folder: Path) -> Path:
    """A small corpus of this file's own text."""
    command = [sys.executable, "-m", "jaxgpt.cli", "data", "encode", __file__, "--out", str(folder)]
    command += ["--tokenizer", "char", "--val-fraction", "0", "--accept"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def pretrain(data: Path, out: Path, steps: int) -> list[str]:
    """The command of every run; eight rows a step."""
    shape = ["--preset", "llama-tiny", "--hidden-size", "64", "--num-hidden-layers", "2"]
    run = ["--steps", str(steps), "--batch-size", "8", "--sequence-length", "32", "--warmup-steps", "2"]
    saves = ["--save-every", "5", "--eval-every", "0", "--epochs", "99"]
    return ["pretrain", "--data", str(data), "--out", str(out), *shape, *run, *saves]


RUNS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("1 device, rows in two halves", 1, 1, ["--batch-size", "4", "--accumulate", "2"]),
    ("8 devices: data 8", 1, 8, []),
    ("8 devices: data 2, fsdp 2, tensor 2", 1, 8, ["--fsdp", "2", "--tensor-parallel", "2"]),
    ("2 processes x 4: fsdp 8", 2, 4, ["--fsdp", "8"]),
    ("2 processes x 4: data 4, tensor 2", 2, 4, ["--tensor-parallel", "2"]),
)


def compare(folder: Path, steps: int) -> int:
    """Run all, print the table; 0 where all agree."""
    data = encoded(folder / "data")
    alone = folder / "alone"
    assert Processes(alone, pretrain(data, alone, steps), count=1, devices=1).codes(within=600) == [0]
    expected = trained(alone)
    print(f"{steps} steps; last loss on 1 device {expected[-1]['loss']:.6f}\n")
    print("| run | last loss | losses apart, relative | gradient norms apart |\n| --- | --- | --- | --- |")
    worst = 0.0
    for number, (title, count, devices, flags) in enumerate(RUNS):
        out = folder / f"run-{number}"
        run = Processes(out, [*pretrain(data, out, steps), *flags], count=count, devices=devices)
        assert run.codes(within=600) == [0] * count, run.words(0)[-2000:]
        found = trained(out)
        losses, norms = apart(found, expected), apart(found, expected, "grad_norm")
        worst = max(worst, losses, norms)
        print(f"| {title} | {found[-1]['loss']:.6f} | {losses:.1e} | {norms:.1e} |", flush=True)
    return max(lost(folder, data, steps, expected), int(worst > 1e-5))


def lost(folder: Path, data: Path, steps: int, expected: Sequence[Mapping[str, Any]]) -> int:
    """One of two processes is lost after step 7; how the other ends, and what a new start makes of it."""
    wrong = 0
    print("\n| one of two processes | the other ended after | with exit code |\n| --- | --- | --- |")
    for victim, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)):
        out = folder / f"lost-{victim}-{number}"
        pair = Processes(out, [*pretrain(data, out, steps), "--fsdp", "4"])
        pair.after(7)
        pair.running[victim].send_signal(number)
        at = time.monotonic()
        code = pair.running[1 - victim].wait(HEARTBEAT + 30)
        print(f"| {victim}: {number.name} | {time.monotonic() - at:.1f} s | {code} |", flush=True)
        pair.running[victim].kill()
        pair.running[victim].wait()
        wrong += code != 2
    again = Processes(out, ["pretrain", "--out", str(out), "--resume"], slurm=True)
    assert again.codes(within=600) == [0, 0], again.words(0)[-2000:]
    print(f"\nstarted again: {len(trained(out))} steps in the log, losses apart {apart(trained(out), expected):.1e}")
    return int(wrong or len(trained(out)) != steps)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for the runs; a temporary one unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args.out or Path(temporary), args.steps)


if __name__ == "__main__":
    sys.exit(main())
