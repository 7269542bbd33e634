"""What a run says: a progress bar for people, JSONL and TensorBoard for programs, a picture of the loss."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
PICTURE = "loss.png"


class RunLog:
    """Writes `log.jsonl` and `tensorboard/` in the run folder, and progress on stderr.

    A resumed run drops the lines after its step first, so that each step is in the
    log exactly once; a fresh one drops what a run that never saved left behind.
    """

    def __init__(self, folder: Path, steps: int, *, resumed_at: int | None = None):
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.steps = steps
        last = -1 if resumed_at is None else resumed_at
        _truncate(folder / LOG, last)
        self._lines = (folder / LOG).open("a", encoding="utf-8")
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)
        self._progress = _Progress(steps, resumed_at or 0) if sys.stderr.isatty() else None

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line of `log.jsonl`; numbers also go to TensorBoard."""
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._lines.write(json.dumps({name: _json_value(value) for name, value in record.items()}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{event}/{name}", value, step)

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
        """Flush everything, and draw the loss."""
        if self._progress:
            self._progress.stop()
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._lines.close()
        self._board.close()
        picture(self.folder)


def _json_value(value: Any) -> Any:
    """Null for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """The records of a run; a last line cut short by a crash is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read(path.parent) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), "utf-8")
    temporary.replace(path)


def picture(folder: Path) -> Path | None:
    """Draw training and validation loss into `loss.png`; None where nothing was logged."""
    records = read(folder)
    train = [(r["step"], r["loss"]) for r in records if r["event"] == "train"]
    held_out = [(r["step"], r["loss"]) for r in records if r["event"] == "eval"]
    if not train and not held_out:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#08519c", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE
