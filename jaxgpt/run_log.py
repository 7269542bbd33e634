"""What a run says: a progress bar for people, JSONL and TensorBoard for programs, a picture of the loss."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgpt.events_file import EventsFile
from jaxgpt.regular_files import is_there

LOG = "log.jsonl"
PICTURE = "loss.png"


def told(loss: float, unit: str) -> str:
    """A loss in nats for people, e.g. `1.9370`, or of another unit with its name, `2.7945 bits`."""
    return f"{loss / math.log(2):.4f} bits" if unit == "bits" else f"{loss:.4f}"


class RunLog:
    """Writes `log.jsonl` and `tensorboard/` in the run folder, and progress on stderr.

    A resumed run drops the lines after its step first, so that each step is in the
    log exactly once; a fresh one drops what a run that never saved left behind.
    """

    def __init__(self, folder: Path, steps: int, *, resumed_at: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.steps = steps
        last = -1 if resumed_at is None else resumed_at
        self._unwritten = _truncate(folder / LOG, last)
        self._lines = (folder / LOG).open("ab", buffering=0)
        self._board = EventsFile(folder / "tensorboard", first_step=last + 1)
        self._progress = _Progress(steps, resumed_at or 0) if sys.stderr.isatty() else None

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line of `log.jsonl`; numbers also go to TensorBoard.

        Lines that find the disk full wait for the next one, or for `close`.
        """
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._unwritten += (json.dumps({name: _json_value(value) for name, value in record.items()}) + "\n").encode()
        self._flush()
        self._board.write(
            step, {f"{event}/{name}": value for name, value in values.items() if isinstance(value, float)}
        )

    def _flush(self) -> None:
        with suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]

    def sync(self) -> None:
        """Force the lines to disk: a power failure must not take those of a step that counts."""
        with suppress(OSError):
            os.fsync(self._lines.fileno())

    def say(self, text: str) -> None:
        """A line for people."""
        if self._progress:
            self._progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int, summary: str, *, line: bool) -> None:
        """Move the bar; without a terminal, print a line where `line` is set."""
        if self._progress:
            self._progress.advance(step, summary)
        elif line:
            self.say(f"step {step}/{self.steps}  {summary}")

    def close(self) -> None:
        """Flush everything, and draw the loss; what the disk has no room for is said."""
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._flush()
        self.sync()
        self._lines.close()
        self._board.close()
        if self._unwritten:
            self.say(f"the last {self._unwritten.count(10):,} lines of {self.folder / LOG} could not be written")
        try:
            picture(self.folder)
        except OSError as error:
            (self.folder / PICTURE).unlink(missing_ok=True)
            self.say(f"{PICTURE} was not drawn: {error.strerror or error}")


def _json_value(value: Any) -> Any:
    """Null for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class NoLog:
    """What a process says that leaves the log to another of its run: nothing."""

    def write(self, event: str, step: int, **values: Any) -> None:
        """Nothing is written."""

    def sync(self) -> None:
        """There is nothing to force to disk."""

    def say(self, text: str) -> None:
        """Nothing is said."""

    def advance(self, step: int, summary: str, *, line: bool) -> None:
        """There is no bar."""

    def close(self) -> None:
        """Nothing is open."""


class _Progress:
    """A rich progress bar on stderr."""

    def __init__(self, steps: int, done: int):
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=done)
        self._bar.start()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def advance(self, step: int, summary: str) -> None:
        self._bar.update(self._task, completed=step, description=summary)

    def stop(self) -> None:
        self._bar.stop()


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; lines that are none, as the last one of a crash, are left out."""
    path = folder / LOG
    return [record for line in path.read_bytes().split(b"\n") if (record := _record(line))] if path.exists() else []


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None unless it says what happened at which step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    told = isinstance(record, dict) and isinstance(record.get("event"), str) and type(record.get("step")) is int
    return record if told else None


def _truncate(path: Path, step: int) -> bytes:
    """Cut the log behind the last line of `step`; what must come before the next line.

    In place, which needs no room: steps never go back in a log, so what goes is its end.
    """
    if not is_there(path):
        return b""
    kept, end = 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        end += len(line)
        record = _record(line)
        if record and record["step"] > step:
            break
        kept = end if record else kept
    os.truncate(path, kept)
    return b"" if not kept or path.read_bytes().endswith(b"\n") else b"\n"


def _losses(records: list[dict[str, Any]], event: str) -> list[tuple[int, float]]:
    """Those that are numbers: that of a step gone wrong is null."""
    return [(r["step"], r["loss"]) for r in records if r["event"] == event and isinstance(r.get("loss"), float)]


def picture(folder: Path) -> Path | None:
    """Draw training and validation loss into `loss.png`; None where nothing was logged."""
    records = read(folder)
    train, held_out = _losses(records, "train"), _losses(records, "eval")
    if not train and not held_out:
        return None
    from matplotlib.figure import Figure

    # A layout that measures its labels draws everything twice; these margins hold what the scale can write.
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.15)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#08519c", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE
