"""`jaxgpt tokenizer repair`: what was saved wrongly of a tokenizer is put right, in every step of a run.

Wrong are domain tokens that were registered as special ones, so that they vanish from
decoded text, and states of older programs. No id changes and no weight is touched.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt import checkpoint, manifest, step_folder, step_rewrite
from jaxgpt.chat import TEMPLATES, Template
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.jinja.template import JinjaTemplate
from jaxgpt.legacy_tokenizer import Change, completed
from jaxgpt.special_tokens import ALWAYS, Special
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies.vocabulary_files import ENDS

_SAID = {**ALWAYS, **{name: text for template in TEMPLATES.values() for name, text in template.specials.items()}}
"""Special tokens that jaxgpt's own templates need, name to string."""
_CONTROL = re.compile(r"<[|｜].*[|｜]>|\[.*\]|</?[a-z_]*\d*>", re.DOTALL)
"""How vocabularies spell what controls a model: `<|eot_id|>`, `[CLS]`, `</s>`, `<mask>`, `<extra_id_0>`."""


@dataclass(frozen=True)
class Repair:
    """What is to be done to one step."""

    path: Path
    changes: tuple[Change, ...]
    state: Mapping[str, Any]
    """The tokenizer's, as it will be."""
    left: tuple[str, ...]
    """Special tokens of the base vocabulary that look like content, and are left as they are."""

    @property
    def guessed(self) -> bool:
        """Some of it is not certain."""
        return any(change.guessed for change in self.changes)


# -- What is wrong ---------------------------------------------------------------------


def plan(directory: str | Path, content: Collection[str] = ()) -> list[Repair]:
    """What is to be done in every step of a run, or in one step; none where all is well. Nothing is written.

    Args:
        directory: a run folder, or a step's folder.
        content: special tokens that are content, whatever they look like.

    Raises:
        InputError: no checkpoint, a damaged one, a state that cannot be repaired, or a
            string of `content` that is no special token, or that a template needs.
    """
    directory = Path(directory).absolute()
    folders = [directory]
    if not (directory / manifest.MANIFEST).exists():
        folders = [path for _, path in sorted(step_folder.folders(directory).items())]
        folders = folders or step_folder.candidates(directory, None)
    found: list[Repair] = []
    for path in folders:
        try:
            manifest.verify(path, unhashed=("params", "train"))
            found.append(_of_step(path, content))
        except InputError as error:
            raise InputError(f"{step_folder.title(path)}: {error}") from None
    return found


def _of_step(path: Path, content: Collection[str]) -> Repair:
    model, state = step_folder.document(path, step_folder.MODEL), step_folder.document(path, step_folder.TOKENIZER)
    if state is None:
        raise InputError("it has no tokenizer; import its model with the tokenizer's files")
    try:
        config = ModelConfig.from_dict((model or {})["config"])
        eos = list((model or {})["generation"]["eos_token_ids"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{step_folder.MODEL} is not what jaxgpt wrote ({error!r})") from None
    values = step_folder.document(path, step_folder.TEMPLATE)
    template = None if values is None else Template.from_dict(values)
    whole, changes = completed(state, config.vocab_size, template, eos)
    tokenizer = Tokenizer.from_state(whole, config.vocab_size)
    texts, left = _content(tokenizer, template, eos, content)
    if texts:
        tokenizer = tokenizer.with_content(texts)
        changes += [Change(text, tokenizer.added[text], "special: vanishes", "added: printed") for text in texts]
    return Repair(path, tuple(changes), tokenizer.state() if texts else whole, tuple(left))


def _content(
    tokenizer: Tokenizer, template: Template | None, eos: Sequence[int], asked: Collection[str]
) -> tuple[list[str], list[str]]:
    """Special tokens that are content, and those that only look so."""
    needed = {special.text for special in tokenizer.specials if _is_needed(special, template, eos)}
    specials = [special.text for special in tokenizer.specials]  # by id
    for text in asked:
        if text not in specials and text not in tokenizer.added:
            raise InputError(f"{text!r} is no token of it; leave it out")
        if text in needed:
            raise InputError(f"{text!r} must stay special: it ends texts, fills batches or marks turns")
    like = [special.text for special in tokenizer.specials if special.text not in needed and _is_content(special.text)]
    own = tokenizer.encoder.specials
    texts = [text for text in specials if text in asked or (text in like and text not in own)]
    left = [text for text in like if text in own and text not in asked]
    return texts, left


def _is_needed(special: Special, template: Template | None, eos: Sequence[int]) -> bool:
    """Something is done with it besides printing."""
    if special.name in _SAID or special.text in (*_SAID.values(), *ENDS) or special.id in eos:
        return True
    if isinstance(template, JinjaTemplate):
        written = (*template.sources.values(), *template.variables.values())
        return any(special.text in text for text in written)
    return template is not None and special.text in template.specials.values()


def _is_content(text: str) -> bool:
    return not _CONTROL.fullmatch(text)


# -- Writing ---------------------------------------------------------------------------


def apply(repairs: Sequence[Repair]) -> None:
    """Write the repaired states; each step is at any moment the old or the new one, whole.

    A new folder is made of links to the old one's arrays, checked, forced to disk and
    renamed, as when a step is saved.

    Raises:
        InputError: a repaired step that could not be loaded; nothing is changed.
    """
    ready: list[Path] = []
    try:
        for repair in repairs:
            ready.append(_prepared(repair))
    except BaseException:
        for partial in ready:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for partial, repair in zip(ready, repairs, strict=True):
        checkpoint.acknowledge(partial, repair.path)


def run_folder(directory: Path) -> Path:
    """What has to be locked: the run folder itself, or that of a step, which may just be renamed."""
    return directory if directory.is_dir() and not (directory / manifest.MANIFEST).exists() else directory.parent


def recover(directory: str | Path) -> None:
    """Put back what a killed repair renamed, of one step or of every one of a run: the old or the new one stands."""
    directory = Path(directory).absolute()
    here = run_folder(directory)
    for replaced in here.glob(".*.replaced"):
        final = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
        if here == directory or final == directory:
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            elif (replaced / manifest.MANIFEST).is_file():
                os.rename(replaced, final)


def _prepared(repair: Repair) -> Path:
    """The repaired step beside the present one, under a name that does not count."""
    path = repair.path
    text = json.dumps(repair.state, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        return step_rewrite.prepared(path, step_folder.TOKENIZER, text)
    except InputError as error:
        raise InputError(f"{step_folder.title(path)} cannot be repaired: {error}") from None
    except OSError as error:
        raise InputError(f"{path.parent} was not written: {error.strerror or error}; nothing is changed") from None
