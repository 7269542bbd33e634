"""SIGTERM at every stage of a run, full disks and read-only folders: how long until it is out, and what is saved.

Each case is `jaxgpt pretrain` in a process of its own. SIGTERM comes while the step is compiled, between
steps, while a checkpoint is written, and in a validation; the run must be out within 30 seconds with
its newest state saved. A small tmpfs is filled up in the middle of a run, for good, for a while, and
before it begins; one is mounted read-only. There, the run must end with one line and no traceback, the
steps it had saved must verify, and the log must have each step once. Without the right to mount, those
cases are left out, and the last line says so. Exit 1 where a case ends otherwise.

    python scripts/reliability_stops.py
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from reliability_run import encode_text, words

from jaxgpt import checkpoint, manifest, run_log

LIMIT = 30
"""Seconds from the signal to the end."""
NO_LIMIT = 10**6
"""Steps that no case reaches."""
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
"""Of saves that take long enough to be met: 13 M parameters, 150 MB with the optimizer's state."""


@dataclass(frozen=True)
class Ending:
    """How a case ended."""

    name: str
    seconds: float
    """From the signal, or from where the run could know, to the end."""
    code: int
    saved: int | None
    """Newest step that verifies."""
    taken: int
    """Newest step in the log."""
    said: str
    """Last line on stderr."""
    problems: list[str]


class Run:
    """A run under way."""

    def __init__(self, folder: Path, out: Path, arguments: list[str]):
        self.out, self.stderr = out, folder / f"{out.name}.stderr"
        environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
        with self.stderr.open("w") as file:
            command = [sys.executable, "-m", "jaxgpt", *arguments]
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env=environment)

    def until(self, seen: Callable[["Run"], bool], seconds: float = 300) -> None:
        """Wait for what can be seen of the run from outside."""
        end = time.monotonic() + seconds
        while not seen(self):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.out} did not get there:\n{self.stderr.read_text()[-2000:]}")
            time.sleep(0.002)

    def ended(self, name: str, begun: float, codes: tuple[int, ...]) -> Ending:
        """Wait for the end; what must be true of any."""
        try:
            code = self.process.wait(4 * LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        seconds = time.monotonic() - begun
        text = self.stderr.read_text()
        of_jax = ("WARNING", "Compiling", "Finished")
        lines = [line for line in text.splitlines() if line and not line.startswith(of_jax)]
        problems = ["a traceback"] if "Traceback" in text else []
        problems += [f"{seconds:.0f} s"] if seconds > LIMIT and "SIGTERM" in name else []
        problems += [f"exit code {code}"] if code not in codes else []
        steps = [record["step"] for record in run_log.read(self.out) if record["event"] == "train"]
        problems += ["a step is logged twice, or not"] if steps != [*range(1, len(steps) + 1)] else []
        saved = checkpoint.steps(self.out)
        for step in saved:
            manifest.verify(self.out / f"step-{step:08d}")
        newest = saved[-1] if saved else None
        return Ending(name, round(seconds, 1), code, newest, len(steps), lines[-1] if lines else "", problems)


def logged(out: Path, step: int) -> bool:
    """Whether a training step is in the log."""
    return any(record["event"] == "train" and record["step"] >= step for record in run_log.read(out))


# -- SIGTERM ---------------------------------------------------------------------------

MOMENTS: dict[str, Callable[[Run], bool]] = {
    "compile": lambda run: "Compiling jit(train_step)" in run.stderr.read_text(),
    "step": lambda run: logged(run.out, 3),
    "save": lambda run: any(run.out.glob(".step-*.partial*")),
    "evaluation": lambda run: logged(run.out, 6),
}
"""Where SIGTERM comes; steps 5, 10, … are saved, and step 6 is followed by a validation of minutes."""


def terminated(moment: str, folder: Path, data: Path) -> Ending:
    """SIGTERM at a moment of a run; all that was done is saved."""
    out = folder / moment
    settings = ["--steps", NO_LIMIT, "--epochs", NO_LIMIT, "--save-every", 5, "--eval-every", 6]
    # The validation of step 0 has the same number of batches: it is short only where it is not the moment.
    batches = 10**4 if moment == "evaluation" else 1
    sizes: dict[str, Any] = {} if moment == "evaluation" else LARGE
    run = Run(folder, out, words(out, data, *settings, "--eval-batches", batches, **sizes))
    run.until(MOMENTS[moment])
    begun = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    ending = run.ended(f"SIGTERM in {moment}", begun, (130,))
    if ending.taken != (ending.saved or 0):
        ending.problems.append(f"step {ending.taken} was taken, {ending.saved} is saved")
    return ending


# -- Disks -----------------------------------------------------------------------------


class Disk:
    """A tmpfs of so many bytes; raises OSError where this process may not mount."""

    def __init__(self, path: Path, size: str):
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def read_only(self) -> None:
        """Nothing can be written any more."""
        self._mount("-o", "remount,ro")

    def fill(self) -> None:
        """Take every block that is left."""
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Give back what `fill` took."""
        (self.path / "filler").unlink()

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


SHORT = ["--epochs", NO_LIMIT, "--save-every", 10, "--eval-every", 50]


def full_for_a_while(disk: Disk, folder: Path, data: Path) -> Ending:
    """Saves fail, then succeed again: nothing is lost."""
    out = disk.path / "run"
    run = Run(folder, out, words(out, data, *SHORT, "--steps", 400))
    run.until(lambda run: 20 in checkpoint.steps(run.out))
    disk.fill()
    run.until(lambda run: "was not saved: disk full" in run.stderr.read_text())
    disk.free()
    ending = run.ended("disk full for a while", time.monotonic(), (0,))
    if (ending.saved, ending.taken) != (400, 400):
        ending.problems.append(f"step {ending.saved} is saved, {ending.taken} are logged")
    return ending


def full_for_good(disk: Disk, folder: Path, data: Path) -> Ending:
    """A save fails; SIGTERM; the last save fails, too, and the steps before stand."""
    out = disk.path / "run"
    run = Run(folder, out, words(out, data, *SHORT, "--steps", NO_LIMIT))
    run.until(lambda run: 20 in checkpoint.steps(run.out))
    disk.fill()
    run.until(lambda run: "was not saved: disk full" in run.stderr.read_text())
    begun = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    ending = run.ended("disk full, SIGTERM", begun, (2,))
    if ending.saved is None or "was not saved: disk full" not in ending.said:
        ending.problems.append(f"said {ending.said!r}")
    return ending


def too_small(disk: Disk, folder: Path, data: Path) -> Ending:
    """No step is taken that could not be saved."""
    out = disk.path / "run"
    begun = time.monotonic()
    run = Run(folder, out, words(out, data, *SHORT, "--steps", 400))
    ending = run.ended("disk too small from the start", begun, (2,))
    if ending.taken or " needs room for " not in ending.said:
        ending.problems.append(f"step {ending.taken}, said {ending.said!r}")
    return ending


def read_only(disk: Disk, folder: Path, data: Path) -> Ending:
    """A folder that cannot be written is said in one line."""
    disk.read_only()
    out = disk.path / "run"
    begun = time.monotonic()
    run = Run(folder, out, words(out, data, *SHORT, "--steps", 400))
    ending = run.ended("read-only folder", begun, (2,))
    if ending.taken or "Read-only file system" not in ending.said:
        ending.problems.append(f"step {ending.taken}, said {ending.said!r}")
    return ending


DISKS = {full_for_a_while: "4m", full_for_good: "4m", too_small: "2m", read_only: "4m"}
"""A checkpoint takes 1 MB; two are kept while the third is written."""


def main() -> int:
    """Run every case; one JSON line last."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    endings: list[Ending] = []
    left_out = ""
    print("| case | s to the end | exit code | last step | saved | last line |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        data = encode_text(folder / "data")
        for moment in MOMENTS:
            endings.append(told(terminated(moment, folder, data), folder))
            shutil.rmtree(folder / moment, ignore_errors=True)
        for number, (case, size) in enumerate(DISKS.items()):
            try:
                disk = Disk(folder / f"disk{number}", size)
            except OSError as error:
                left_out = str(error)
                continue
            with disk:
                endings.append(told(case(disk, folder, data), folder))
    for ending in endings:
        for problem in ending.problems:
            print(f"{ending.name}: {problem}")
    result = {
        "cases": len(endings),
        "longest_seconds": max(ending.seconds for ending in endings if "SIGTERM" in ending.name),
        "problems": sum(len(ending.problems) for ending in endings),
        "disks_left_out": left_out or None,
    }
    print(json.dumps(result))
    return 1 if result["problems"] else 0


def told(ending: Ending, folder: Path) -> Ending:
    """Print a row of the table."""
    said = ending.said.replace(f"{folder}/", "")
    print(
        f"| {ending.name} | {ending.seconds} | {ending.code} | {ending.taken} | {ending.saved} | {said} |", flush=True
    )
    return ending


if __name__ == "__main__":
    sys.exit(main())
