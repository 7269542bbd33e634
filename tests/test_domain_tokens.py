"""Tokens found whole in text, as tokenizers finds them; domain tokens added to a model, and what other programs see."""

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_vocabularies as small
import tokenizers
from tokenizers import AddedToken

from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import vocabulary_files
from jaxgpt.vocabularies.token_matching import is_word

# -- Edges -----------------------------------------------------------------------------

EDGED = (
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<mask>", special=True, lstrip=True, normalized=False),
    AddedToken("<r>", special=True, rstrip=True, normalized=False),
    AddedToken("<both>", special=True, lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", special=True, single_word=True, normalized=False),
    AddedToken("<tool>", lstrip=True, normalized=False),
    AddedToken("<late>", normalized=True),
    AddedToken("<lone>", single_word=True, normalized=True),
    AddedToken("<tool>>", normalized=False),
)
SPACING = (" ", "  ", "\n", "\u3000", "\x1c")
PARTS = [*(token.content for token in EDGED), *SPACING, "<MUL_2>", "ol>x", "s", "e\u0301", "_", "1", "<", "x"]


def edged(folder: Path, extra: Sequence[AddedToken] = ()) -> tuple[Tokenizer, Any]:
    """A vocabulary with tokens of every flag, in jaxgpt and in the package, which finds special tokens too."""
    library = small.library("qwen2", specials=(), content=())
    for token in EDGED:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    found = vocabulary_files.read(folder)
    assert found.notices == []
    library.add_tokens(list(extra))
    return Tokenizer.of_vocabulary(found.kind, found.encoder, None, names=found.names), library


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("domain", [False, True])
@pytest.mark.parametrize("specials", [False, True])
def test_tokens_take_white_space_and_word_boundaries_as_in_tokenizers(tmp_path: Path, specials: bool, domain: bool):
    new = ["<MUL_2>", "ol>x"] if domain else []
    tokenizer, library = edged(tmp_path / "in", [AddedToken(text, normalized=False) for text in new])
    tokenizer = tokenizer.with_added(new)
    library.encode_special_tokens = not specials
    for text in texts(1500):
        assert tokenizer.encode(text, specials=specials) == library.encode(text).ids, text


def test_a_mask_takes_the_space_before_it(tmp_path: Path):
    tokenizer = edged(tmp_path / "in")[0]
    mask = tokenizer.encode("<mask>", specials=True)
    assert tokenizer.encode("a \t<mask>", specials=True) == [*tokenizer.encode("a"), *mask]
    assert tokenizer.encode("a \t<mask>") != tokenizer.encode("a \t<mask>", specials=True)


def test_letters_are_those_of_the_package():
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    library.add_tokens([AddedToken("w", single_word=True, normalized=False)])
    codes = [*range(0x3400), *range(0x1F100, 0x1F200), *range(0xA000, 0x32000, 41)]
    # Of characters newer than its Unicode, Python knows nothing.
    every = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    word = library.token_to_id("w")
    within = [word not in encoding.ids for encoding in library.encode_batch_fast([f"{c}w" for c in every])]
    assert [c for c, theirs in zip(every, within, strict=True) if is_word(c) != theirs] == []
