"""`jaxgpt import` and `jaxgpt export`."""

from jaxgpt.settings import ExportSettings, ImportSettings
from jaxgpt.verbs.output import Output, waiting


def import_(settings: ImportSettings, output: Output) -> int:
    """A Hugging Face folder as a checkpoint."""
    from jaxgpt.formats import hf

    with waiting("importing"):
        cast = None if settings.dtype == "keep" else settings.dtype
        notices = hf.import_hf(settings.source, settings.directory, cast=cast)
    return _done(notices, settings.directory, f"imported {settings.source} into {settings.directory}", output)


def export(settings: ExportSettings, output: Output) -> int:
    """A checkpoint as a folder for other programs."""
    from jaxgpt.formats import hf

    with waiting("exporting"):
        notices = hf.export_hf(settings.directory, settings.out)
    return _done(notices, settings.out, f"exported {settings.directory} to {settings.out}", output)


def _done(notices: list[str], written: str, text: str, output: Output) -> int:
    for notice in notices:
        output.note(notice)
    if output.json:
        output.result({"written": written, "notices": notices})
    output.say(text)
    return 0
