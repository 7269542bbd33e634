"""`jaxgpt import` and `jaxgpt export`."""

from jaxgpt.settings import ExportSettings, ImportSettings
from jaxgpt.verbs.output import Output, waiting
from jaxgpt.verbs.progress import bytes_bar


def import_(settings: ImportSettings, output: Output) -> int:
    """Another program's model as a checkpoint."""
    from jaxgpt.formats import importing

    overrides = importing.settings_of(settings.set)
    cast = None if settings.dtype == "keep" else settings.dtype
    with bytes_bar("importing") as progress:
        notices = importing.import_model(
            settings.source,
            settings.directory,
            cast=cast,
            overrides=overrides,
            verify=settings.verify,
            progress=progress,
        )
    return _done(notices, settings.directory, f"imported {settings.source} into {settings.directory}", output)


def export(settings: ExportSettings, output: Output) -> int:
    """A checkpoint as a folder or file for other programs."""
    from jaxgpt.formats import gguf_export, hf

    if settings.format == "gguf":
        with bytes_bar("exporting") as progress:
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
