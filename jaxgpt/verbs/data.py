"""`jaxgpt data encode` and `jaxgpt data inspect`."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.errors import InputError
from jaxgpt.settings import DataEncodeSettings, DataInspectSettings
from jaxgpt.verbs.output import Output, printable
from jaxgpt.verbs.progress import shown

if TYPE_CHECKING:
    from jaxgpt.chat import Rendered, Template
    from jaxgpt.data.encode import Progress
    from jaxgpt.tokenizer import Tokenizer

SHOWN = 10
"""Tokens shown first of an episode's beginning, and of its end."""


def encode(settings: DataEncodeSettings, output: Output) -> int:
    """Text to token shards, with statistics."""
    from jaxgpt.chat import TEMPLATES
    from jaxgpt.data import encode as encoding
    from jaxgpt.data.sources import documents

    if not settings.out:
        raise InputError("--out is missing; give the folder to write the shards into")
    if settings.workers is not None and settings.workers < 1:
        raise InputError(f"workers must be at least 1, got {settings.workers}")
    if checkpoint := _checkpoint(settings, output, "--template"):
        tokenizer, template = _of_checkpoint(checkpoint)
    else:
        template = TEMPLATES[settings.template]
        texts = (document.text for source in settings.sources for document in documents(source))
        tokenizer = _chosen(settings, template, texts, output)
    with _progress() as progress:
        report = encoding.encode(
            settings.sources,
            settings.out,
            tokenizer,
            template=template,
            shard_tokens=settings.shard_tokens,
            val_fraction=settings.val_fraction,
            workers=settings.workers,
            progress=progress,
            accept=settings.accept,
        )
    if output.json:
        output.result({"folder": str(report.folder), **{k: v for k, v in report.index.items() if k != "tokenizer"}})
    output.say(str(report))
    return 0


def _chosen(
    settings: DataEncodeSettings | DataInspectSettings, template: "Template", corpus: Iterable[str], output: Output
) -> "Tokenizer":
    from jaxgpt.tokenizer_choice import chosen

    kind = None if settings.tokenizer_kind == "auto" else settings.tokenizer_kind
    tokenizer, notices = chosen(settings.tokenizer, template, corpus=corpus, kind=kind)
    for notice in notices:
        output.note(notice)
    return tokenizer


def _checkpoint(settings: DataEncodeSettings | DataInspectSettings, output: Output, *more: str) -> str:
    """The checkpoint that --model or --tokenizer names, empty for none; InputError where `more` flags contradict it."""
    from jaxgpt import step_folder
    from jaxgpt.tokenizer_choice import NAMES

    named = settings.tokenizer
    if not settings.model and (named in NAMES or not step_folder.is_checkpoint(Path(named))):
        return ""
    flag = "--model" if settings.model else "--tokenizer"
    made = [other for other in ("--tokenizer", "--tokenizer-kind", *more) if other in output.given and other != flag]
    if made:
        brings = "--model" if settings.model else f"--tokenizer {named}, a checkpoint,"
        raise InputError(f"{brings} brings its own tokenizer and template, got {' '.join(made)} too; drop one")
    return settings.model or named


def _of_checkpoint(directory: str) -> "tuple[Tokenizer, Template | None]":
    from jaxgpt import manifest, step_folder

    path = step_folder.latest(directory)
    manifest.verify(path, unhashed=("params", "train"))
    found = step_folder.read(path)
    if found.tokenizer is None:
        raise InputError(f"{directory} has no tokenizer jaxgpt knows; give --tokenizer a kind or file instead")
    return found.tokenizer, found.template


@contextmanager
def _progress() -> "Generator[Callable[[Progress], None] | None]":
    """A bar on a terminal; first the characters are counted, then encoded."""
    with shown("TaskProgressColumn") as bar:
        if bar is None:
            yield None
            return
        task = bar.add_task("reading", total=None)
        judged = False

        def report(now: "Progress") -> None:
            nonlocal judged
            if now.sample is not None and not judged:
                judged = True
                bar.console.print(f"first documents: {now.sample}", markup=False, highlight=False)
            text = f"{now.stage}  {now.tokens:,} tokens" if now.tokens else f"{now.stage}  {now.done:,} characters"
            bar.update(task, completed=now.done, total=now.total or None, description=text)

        yield report


# -- Inspect ---------------------------------------------------------------------------


def inspect(settings: DataInspectSettings, output: Output) -> int:
    """Each token of chat JSONL and whether it is trained."""
    from jaxgpt.data.episodes import read_episodes

    tokenizer, template = _for_inspection(settings, output)
    found = read_episodes(settings.file, tokenizer, template, settings.sequence_length)
    output.note(str(found))
    if not output.json and not output.terminal:
        output.say("tokens in [brackets] are trained")
    for number, episode in enumerate(found.episodes[: settings.episodes], start=1):
        if output.json:
            names = [tokenizer.token_name(id) for id in episode.ids]
            output.result({"episode": number, "ids": episode.ids, "mask": episode.mask, "tokens": names})
        else:
            _show(number, episode, tokenizer, output)
    return 0


def _for_inspection(settings: DataInspectSettings, output: Output) -> "tuple[Tokenizer, Template]":
    from jaxgpt.chat import TEMPLATES
    from jaxgpt.data.episodes import read_messages

    chosen = TEMPLATES[settings.template] if settings.template else None
    if checkpoint := _checkpoint(settings, output):
        tokenizer, own = _of_checkpoint(checkpoint)
        template = chosen or own
        if template is None:
            raise InputError(f"{checkpoint} has no chat template; choose one with --template")
        return tokenizer.with_template(template), template
    template = chosen or TEMPLATES["chatml"]

    def corpus() -> Iterator[str]:
        for _, messages in read_messages([settings.file]):
            yield from (message["content"] for message in messages)

    return _chosen(settings, template, corpus(), output), template


def _show(number: int, episode: "Rendered", tokenizer: "Tokenizer", output: Output) -> None:
    from jaxgpt.data.episodes import describe_episode

    tokens = describe_episode(episode, tokenizer)
    trained = sum(episode.mask)
    output.say(f"episode {number}: {len(tokens):,} tokens, {trained:,} trained")
    parts = {"first": tokens[:SHOWN], "last": tokens[-SHOWN:]}
    if len(tokens) > 2 * SHOWN:
        parts["all"] = tokens
    elif len(tokens) <= SHOWN:
        parts = {"all": tokens}
    for name, part in parts.items():
        # Colours are for eyes; what a program reads must not need them.
        marked = (_coloured(*token) if output.terminal else _bracketed(*token) for token in part)
        print(f"  {name:<6}{' '.join(marked)}", file=output.results)


def _coloured(name: str, trains: bool) -> str:
    return f"\x1b[{'1;32' if trains else '2'}m{printable(name)}\x1b[0m"


def _bracketed(name: str, trains: bool) -> str:
    return f"[{name}]" if trains else name
