"""Progress bars, on a terminal alone."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxgpt.verbs.output import printable

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def bytes_bar(what: str) -> "Generator[Callable[[int, int], None] | None]":
    """A function of bytes done and bytes in all; None where nobody would see the bar."""
    with shown("DownloadColumn", "TransferSpeedColumn", transient=True) as bar:
        if bar is None:
            yield None
            return
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def shown(*columns: str, transient: bool = False) -> "Generator[Progress | None]":
    """A bar on stderr with columns of `rich.progress` after it; None where stderr is no terminal.

    A transient one is gone when its work is done.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    # What is done may be named by other people: it is no markup.
    what = progress.TextColumn("{task.description}", markup=False)
    parts = (
        what,
        progress.BarColumn(),
        *(getattr(progress, name)() for name in columns),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*parts, console=Console(stderr=True), transient=transient) as bar:
        yield bar
