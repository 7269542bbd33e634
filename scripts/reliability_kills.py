"""SIGKILL at seeded moments of training runs, each resumed: what is lost, and is what follows the same?

A tiny model trains on text made here, saving every few steps. Every second kill is at a named
point of a save; the others come some milliseconds after a step, or while the process starts.
Each run is killed again and again, resumed with `--resume` each time (started anew where no step
was saved), until it reaches its last step. Then, against a run that nobody disturbed:

- every step is in its log exactly once, with the same bits of loss and the same checksum of its batch,
- so is every validation, with the same bits of loss,
- parameters and training state of the last step are the same bits.

After each kill, the newest step that the log had called saved must be there and verify.

Each run is the command `jaxgpt pretrain` in a process of its own. It is forked from this one, which
has imported what takes seconds to import and started nothing. Exit 1 where anything differs.

    python scripts/reliability_kills.py                        # 200 kills
    python scripts/reliability_kills.py --count 20 --seed 7
"""

# Private functions are where a save is interrupted.
# pyright: reportPrivateUsage=false

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Programs are compiled once for all processes, and quickly: they are tiny, and only compared with each other.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
from reliability_run import encode_text, words

# `train`, for what it imports: the processes share it.
from jaxgpt import checkpoint, cli, manifest, run_log, step_folder, train  # noqa: F401  # pyright: ignore[reportUnusedImport]
from jaxgpt.run_log import RunLog

SAVE_EVERY, EVAL_EVERY = 4, 6
"""Validations fall between saves as well as on them."""
LONGEST_START, LONGEST_DELAY = 2.0, 0.4
"""Seconds: of starting, and of a few steps with a save."""
LONGEST_RUN = 300
"""Seconds."""
DIE = Callable[[], object]


@dataclass(frozen=True)
class Kill:
    """When a process dies."""

    point: str = ""
    """Of a save; empty for a moment of the run."""
    nth: int = 1
    """Save of this process."""
    steps: int = 0
    """Steps the process takes before the moment; 0 while it starts."""
    delay: float = 0.0
    """Seconds from there to the kill."""


# -- Points of a save ------------------------------------------------------------------


def around(owner: Any, name: str, nth: int, die: DIE, *, after: bool = False, only: str = "") -> None:
    """Die before or after the nth call of `owner.name` whose first argument ends with `only`."""
    plain, calls = getattr(owner, name), 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls
        counts = str(args[0] if args else "").endswith(only)
        calls += counts
        if counts and calls == nth and not after:
            die()
        result = plain(*args, **named)
        if counts and calls == nth:
            die()
        return result

    setattr(owner, name, call)


def half_deleted(nth: int, die: DIE) -> None:
    """Die when half the files of the nth step that is thinned out are gone."""
    plain, calls = checkpoint._delete, 0

    def delete(path: Path) -> None:
        nonlocal calls
        calls += path.name.endswith(".trash")
        if path.name.endswith(".trash") and calls == nth:
            files = sorted(file for file in path.rglob("*") if file.is_file())
            for file in files[: len(files) // 2]:
                file.unlink()
            die()
        plain(path)

    checkpoint._delete = delete


POINTS: dict[str, Callable[[int, DIE], None]] = {
    "arrays being written": lambda n, die: around(checkpoint, "_begin_arrays", n, die, after=True),
    "arrays written": lambda n, die: around(Path, "write_text", n, die, only="model.json"),
    "half of the JSON written": lambda n, die: around(Path, "write_text", n, die, only="train.json"),
    "files being forced to disk": lambda n, die: around(manifest, "sync", n, die, only="final_norm.weight/c/0"),
    "before the manifest": lambda n, die: around(manifest, "write_synced", n, die),
    "manifest written": lambda n, die: around(manifest, "write_synced", n, die, after=True),
    "before the rename": lambda n, die: around(os, "rename", n, die, only=".partial"),
    "renamed": lambda n, die: around(os, "rename", n, die, after=True, only=".partial"),
    "before deletion": lambda n, die: around(checkpoint, "_thin", n, die),
    "during deletion": half_deleted,
}


# -- Processes -------------------------------------------------------------------------


def run_until(kill: Kill | None, arguments: list[str], errors: Path) -> int:
    """Run the command in a process that dies as planned; its wait status."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        be_the_run(kill, arguments, errors, tell)
    os.close(tell)
    if kill and not kill.point:
        _kill_at(child, kill, told)
    status = os.waitpid(child, 0)[1]
    os.close(told)
    return status


def be_the_run(kill: Kill | None, arguments: list[str], errors: Path, tell: int) -> None:
    """The command, and the end of this process; `tell` is written to when it has taken the steps of the plan."""
    # One that hangs is found, as one that ends otherwise than planned.
    signal.alarm(LONGEST_RUN)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A picture is drawn when a run ends, for two seconds: it is not what is tried here.
    run_log.picture = lambda folder: None
    if kill and kill.point:
        POINTS[kill.point](kill.nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif kill and kill.steps:
        around(RunLog, "advance", kill.steps, lambda: os.write(tell, b"."), after=True)
    os._exit(cli.main(arguments))


def _kill_at(child: int, kill: Kill, told: int) -> None:
    """Wait for the steps, then the delay; a run that ends before is not killed."""
    if kill.steps and not os.read(told, 1):
        return
    time.sleep(kill.delay)
    os.kill(child, signal.SIGKILL)


def planned(number: int, random_: random.Random) -> Kill:
    """The plan of the kill of that number: points in turn, moments by chance."""
    if number % 2:
        return Kill(list(POINTS)[number // 2 % len(POINTS)], nth=random_.randint(1, 3))
    if random_.random() < 0.2:
        return Kill(delay=random_.uniform(0, LONGEST_START))
    return Kill(steps=random_.randint(1, 10), delay=random_.uniform(0, LONGEST_DELAY))


# -- Comparison ------------------------------------------------------------------------


def logged(out: Path, event: str) -> list[tuple[int, str, str]]:
    """Step, bits of the loss and checksum of the batch of each record of an event, in order."""
    records = [r for r in run_log.read(out) if r["event"] == event]
    return [(r["step"], float(r["loss"]).hex(), r.get("batch_sha256", "")) for r in records]


def lost(out: Path) -> list[str]:
    """Steps that the log calls saved, or that have the name of one, and that are not whole."""
    problems: list[str] = []
    saved = [r["step"] for r in run_log.read(out) if r["event"] == "save"]
    # One that was being replaced by itself with golden prompts stands under another name.
    folders = step_folder.folders(out)
    found = sorted(folders)
    if saved and (not found or found[-1] < saved[-1]):
        problems.append(f"step {saved[-1]} was saved, and of {found} none is as new")
    for step in found[-1:]:
        try:
            manifest.verify(folders[step])
        except Exception as error:
            problems.append(f"step {step} does not verify: {error}")
    return problems


def arrays(out: Path) -> dict[str, str]:
    """SHA-256 of each file of parameters and training state of the last step.

    Of files, because nothing may start threads here: processes forked later would wait for them.
    """
    step = out / f"step-{checkpoint.steps(out)[-1]:08d}"
    manifest.verify(step)
    listed = manifest.read(step)
    return {name: entry["sha256"] for name, entry in listed.items() if name.startswith(("params/", "train/"))}


def differences(out: Path, undisturbed: Path) -> list[str]:
    """What a run that went on after kills has otherwise than one that never stopped."""
    problems: list[str] = []
    for event in ("train", "eval"):
        expected, got = logged(undisturbed, event), logged(out, event)
        steps = collections.Counter(step for step, _, _ in got)
        problems += [f"{event} of step {step} is logged {n} times" for step, n in steps.items() if n > 1]
        problems += [f"{event} of step {step} is not logged" for step, _, _ in expected if step not in steps]
        for step, loss, batch in set(got) - set(expected):
            problems.append(f"{event} of step {step} differs: loss {float.fromhex(loss)}, batch {batch}")
    mine, other = (arrays(path) for path in (out, undisturbed))
    problems += [f"{name} differs" for name in sorted(other.keys() | mine.keys()) if mine.get(name) != other.get(name)]
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    return [*problems, *(f"{name} is left" for name in left)]


# -- The trial -------------------------------------------------------------------------


class Trial:
    """Runs killed and resumed, and what was found."""

    def __init__(self, folder: Path, seed: int, steps: int):
        self.folder = folder
        self.steps = steps
        self.random = random.Random(seed)
        self.data = encode_text(folder / "data")
        self.where: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.processes = self.runs = self.compared = 0
        self.undisturbed = folder / "undisturbed"
        assert self._process(None, self.undisturbed) == 0, (folder / "stderr").read_text()

    def _process(self, kill: Kill | None, out: Path) -> int:
        self.processes += 1
        going_on = bool(checkpoint.steps(out))
        settings = ["--steps", self.steps, "--save-every", SAVE_EVERY, "--eval-every", EVAL_EVERY]
        arguments = words(out, resume=True) if going_on else words(out, self.data, *settings)
        return run_until(kill, arguments, self.folder / "stderr")

    def kills(self, count: int) -> None:
        """Kill so often, in as many runs as it takes; compare each with the undisturbed one."""
        begun = time.monotonic()
        while (done := self.where.total()) < count:
            self._run(self.folder / "killed", count)
            each = (time.monotonic() - begun) / (self.where.total() - done or 1)
            print(f"{self.where.total()} kills, run {self.runs}, {each:.1f} s a kill", file=sys.stderr, flush=True)
            begun = time.monotonic()

    def _run(self, out: Path, count: int) -> None:
        while True:
            number = self.where.total()
            kill = planned(number, self.random) if number < count else None
            status = self._process(kill, out)
            if kill and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.where[kill.point or ("a step" if kill.steps else "start")] += 1
                self.problems += [f"kill {number} ({kill}): {problem}" for problem in lost(out)]
            elif status == 0:
                break
            else:
                text = (self.folder / "stderr").read_text()[-500:]
                self.problems.append(f"after kill {number}: exit status {status}: {text}")
                break
        if status == 0:
            self.problems += [f"run {self.runs}: {problem}" for problem in differences(out, self.undisturbed)]
            self.compared += self.steps
        self.runs += 1
        shutil.rmtree(out)


def main() -> int:
    """Run the trial; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=48, help="of a run")
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        trial = Trial(Path(folder), asked.seed, asked.steps)
        trial.kills(asked.count)
    print("| SIGKILL at | kills |\n| --- | --- |")
    for place in ("start", "a step", *POINTS):
        print(f"| {place} | {trial.where[place]} |")
    for problem in trial.problems:
        print(problem)
    result = {
        "kills": trial.where.total(),
        "at_points_of_a_save": sum(trial.where[point] for point in POINTS),
        "processes": trial.processes,
        "runs": trial.runs,
        "steps_compared": trial.compared,
        "problems": len(trial.problems),
        "seed": asked.seed,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(result))
    return 1 if trial.problems else 0


if __name__ == "__main__":
    sys.exit(main())
