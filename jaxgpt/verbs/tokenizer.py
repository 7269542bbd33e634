"""`jaxgpt tokenizer add` and `jaxgpt tokenizer repair`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt import regular_files
from jaxgpt.errors import InputError, first
from jaxgpt.settings import TokenizerAddSettings, TokenizerRepairSettings
from jaxgpt.verbs.output import Output, printable

if TYPE_CHECKING:
    from jaxgpt.legacy_tokenizer import Change
    from jaxgpt.tokenizer_repair import Repair

SHOWN = 20
"""Lines of a table; --json has them all."""


def add(settings: TokenizerAddSettings, output: Output) -> int:
    """A checkpoint with domain tokens."""
    from jaxgpt import domain_tokens

    texts = [*settings.token, *(_lines(Path(settings.tokens)) if settings.tokens else [])]
    added = domain_tokens.add(settings.directory, settings.out, texts)
    if output.json:
        output.result({"written": settings.out, "added": added.ids, "rows": [added.rows_before, added.rows]})
        return 0
    for text, id in list(added.ids.items())[:SHOWN]:
        output.say(f"{id:>8,}  {text}")
    if len(added.ids) > SHOWN:
        output.say(f"{'':>8}  and {len(added.ids) - SHOWN:,} more")
    grew = f"the embedding grew from {added.rows_before:,} to {added.rows:,} rows"
    kept = f"in spare rows of the embedding, which keeps its {added.rows:,}"
    tokens = f"{len(added.ids):,} token{'s' * (len(added.ids) > 1)}"
    output.say(f"added {tokens}; {grew if added.rows > added.rows_before else kept}; wrote {settings.out}")
    return 0


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    regular_files.is_there(path)  # a pipe, say, is refused, not waited for
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file with one token a line") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def repair(settings: TokenizerRepairSettings, output: Output) -> int:
    """The tokenizer of every step of a run."""
    from jaxgpt import tokenizer_repair
    from jaxgpt.run_lock import RunLock

    directory = Path(settings.directory).absolute()
    with RunLock(tokenizer_repair.run_folder(directory)):
        tokenizer_repair.recover(directory)
        steps = tokenizer_repair.plan(directory, settings.token)
        wrong = [step for step in steps if step.changes]
        guessed = [step for step in wrong if step.guessed]
        refused = bool(guessed) and not settings.adopt
        if not refused:
            tokenizer_repair.apply(wrong)
    _show(wrong, output, repaired=not refused)
    left = sorted({text for step in steps for text in step.left})
    if left:
        output.note(
            f"left as they are: special tokens of the base vocabulary that look like content ({first(left)}); "
            f"if they are, say so: {' '.join(f'--token {shlex.quote(text)}' for text in left)}"
        )
    if refused:
        lines = sum(change.guessed for change in guessed[0].changes)
        raise InputError(
            f"{lines} ids of {guessed[0].path.name} are only guessed, from the order of the list; compare them "
            "with what the model was trained with, then add --adopt"
        )
    count = f"{len(wrong)} of {len(steps)} steps"
    nothing = (
        f"nothing certain to repair in {settings.directory}" if left else f"nothing to repair in {settings.directory}"
    )
    output.say(f"repaired {count}; no weight was touched" if wrong else nothing)
    return 0


def _show(wrong: "Sequence[Repair]", output: Output, *, repaired: bool) -> None:
    """What changes, as JSON or as tables: one for all steps in which the same does."""
    if output.json:
        listed = [
            {"path": str(step.path), "changes": [dataclasses.asdict(change) for change in step.changes]}
            for step in wrong
        ]
        output.result({"repaired": repaired and bool(wrong), "steps": listed})
        return
    alike: dict[tuple[Change, ...], list[str]] = {}
    for step in wrong:
        alike.setdefault(step.changes, []).append(step.path.name)
    for changes, names in alike.items():
        output.say("\n".join([first(names, 6), *_table(changes), ""]))


def _table(changes: "Sequence[Change]") -> list[str]:
    rows = [("id", "", "before", "after")]
    for change in changes[:SHOWN]:
        after = f"{change.after}{' (guessed)' * change.guessed}"
        rows.append(("" if change.id is None else f"{change.id}", printable(change.what), change.before, after))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {id:>{widths[0]}}  {what:<{widths[1]}}  {before:<{widths[2]}}  {after}" for id, what, before, after in rows
    ]
    return lines + [f"  … and {len(changes) - SHOWN:,} more"] * (len(changes) > SHOWN)
