"""Which tokenizer new data gets: a kind by name, or the vocabulary of other programs' files."""

from collections.abc import Iterable
from pathlib import Path

from jaxgpt.chat import Template
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import vocabulary_files
from jaxgpt.vocabularies.kinds import END_OF_TEXT
from jaxgpt.vocabularies.vocabulary_files import Kind, is_gpt2

NAMES = ("gpt2", "char")
"""Kinds that need no file."""


def chosen(
    name: str, template: Template, *, corpus: Iterable[str] = (), kind: Kind | None = None
) -> tuple[Tokenizer, list[str]]:
    """A tokenizer with the special tokens of the template, and lines the caller should print.

    Args:
        name: `gpt2`, `char`, or the path of a tokenizer.json, of a folder with
            vocab.json and merges.txt, or of a Hugging Face folder.
        template: what it lacks of its special tokens gets new ids.
        corpus: texts whose characters `char` learns.
        kind: read the files as this kind, whatever they look like.

    Raises:
        InputError: no such kind or file, or a vocabulary that cannot be used.
    """
    if name in NAMES:
        if kind is not None:
            raise InputError(f"--tokenizer-kind {kind} is for files, got --tokenizer {name}; drop one")
        return Tokenizer.create(name, template=template, corpus=corpus if name == "char" else ()), []
    if not Path(name).exists():
        raise InputError(f"--tokenizer {name} is neither {' nor '.join(NAMES)} nor a file or folder; give one of them")
    found = vocabulary_files.read(name, kind=kind)
    # Its own special token is all that kind gpt2 has.
    if kind is None and found.encoder.specials.keys() | found.encoder.added.keys() <= {END_OF_TEXT} and is_gpt2(found):
        return Tokenizer.create("gpt2", template=template), found.notices
    tokenizer = Tokenizer.of_vocabulary(found.kind, found.encoder, template, names=found.names, files=found.files)
    return tokenizer, found.notices
