"""`jaxgpt import` and `jaxgpt export`."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from jaxgpt.settings import ExportSettings, ImportSettings
from jaxgpt.verbs.output import Output, waiting


def import_(settings: ImportSettings, output: Output) -> int:
    """Another program's model as a checkpoint."""
    from jaxgpt.formats import importing

    overrides = importing.settings_of(settings.set)
    with waiting("importing"):
        cast = None if settings.dtype == "keep" else settings.dtype
        notices = importing.import_model(
            settings.source, settings.directory, cast=cast, overrides=overrides, verify=settings.verify
        )
    return _done(notices, settings.directory, f"imported {settings.source} into {settings.directory}", output)


def export(settings: ExportSettings, output: Output) -> int:
    """A checkpoint as a folder or file for other programs."""
    from jaxgpt.formats import gguf_export, hf

    if settings.format == "gguf":
        with _bar("exporting") as progress:
            notices = gguf_export.export_gguf(settings.directory, settings.out, dtype=settings.dtype, progress=progress)
    else:
        assert settings.dtype != "q8_0"  # refused by the settings
        with waiting("exporting"):
            cast = None if settings.dtype == "keep" else settings.dtype
            notices = hf.export_hf(settings.directory, settings.out, cast=cast)
    return _done(notices, settings.out, f"exported {settings.directory} to {settings.out}", output)


def _done(notices: list[str], written: str, text: str, output: Output) -> int:
    for notice in notices:
        output.note(notice)
    if output.json:
        output.result({"written": written, "notices": notices})
    output.say(text)
    return 0


@contextmanager
def _bar(what: str) -> "Generator[Callable[[int, int], None] | None]":
    """On a terminal a bar of bytes done and bytes in all."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
