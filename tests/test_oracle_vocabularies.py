"""The rung of ids on vocabularies of other programs: true ones pass, a wrong rule and a missing BOS are found."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import small_vocabularies as small
from conftest import GPT2, random_params
from jinja_families import BOS, EOS, FAMILIES, SPECIALS
from often import exhaustive_but

from jaxgpt import checkpoint
from jaxgpt.chat import Rendered
from jaxgpt.checkpoint import Contents
from jaxgpt.formats import hf, hf_tokenizer
from oracle import exposure, noise, text_probe
from oracle import text as oracle_text
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.results import RungResult
from oracle.rungs import ids
from oracle.text import Text

ROWS = 768


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    # What reaches the disk after a power cut is tested with checkpoints; here it only costs time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def compared(source: Path, place: Path) -> Comparison:
    """A tiny model with the folder's tokenizer, beside its export and the folder."""
    tokenizer, template = hf_tokenizer.read(source, ROWS, [])
    assert tokenizer is not None
    config = dataclasses.replace(GPT2, vocab_size=ROWS, num_hidden_layers=1)
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    contents = Contents(config, params, "base", "float32", list(tokenizer.stop_ids), tokenizer, template, {})
    checkpoint.save(place / "run", 0, contents).result()
    loaded = checkpoint.load(place / "run")
    hf.write(loaded, place / "hf")
    candidate = Candidate(loaded.config, loaded.params, "float32", text=Text.of(loaded))
    calibration = noise.stored_calibration()
    return Comparison(candidate, cast(Reference, None), export=place / "hf", source=source, calibration=calibration)


def told(rung: RungResult) -> list[str]:
    return [f"{f.tap}: {f.problem}" for f in rung.findings if not f.ok]


def problems(comparison: Comparison) -> list[str]:
    return told(ids.run(comparison))


FOLDERS: dict[str, Any] = {
    "hf": lambda folder: small.as_json(folder, "qwen2"),
    "bpe": lambda folder: small.as_two_files(folder, "qwen2", "Qwen2Tokenizer"),
    "hex": lambda folder: small.as_two_files(folder, "gpt-2", "GPT2Tokenizer", in_hex=True),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_true_vocabulary_of_another_program_passes(kind: str, tmp_path: Path):
    comparison = compared(FOLDERS[kind](tmp_path / "source"), tmp_path)
    assert comparison.candidate.text is not None
    assert comparison.candidate.text.saved["kind"] == kind
    rung = ids.run(comparison)
    assert told(rung) == []
    assert "against the reference folder's tokenizer and the tokenizer of its own export" in rung.summary


def test_two_files_read_with_the_wrong_rule_are_found(tmp_path: Path):
    source = small.as_two_files(tmp_path / "source", "qwen2", "GPT2Tokenizer")
    comparison = compared(source, tmp_path)
    notes = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**notes, "tokenizer_class": "Qwen2Tokenizer"}))
    assert problems(comparison)[0].startswith("text.encode: ")


def test_a_bos_that_the_folder_asks_for_is_expected_before_raw_text(tmp_path: Path):
    source = small.as_json(tmp_path / "source", "llama-bpe")
    content = json.loads((source / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [701], "tokens": ["<|im_start|>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    comparison = compared(source, tmp_path)
    assert problems(comparison) == []
    without = ids.with_text(comparison.candidate, bos_ids=())
    assert problems(dataclasses.replace(comparison, candidate=without))[0].startswith("text.bos: ")


# -- Imported templates ------------------------------------------------------------------


def with_template(folder: Path, family: str) -> Path:
    """A vocabulary that has every family's special tokens, and the family's template."""
    small.as_json(folder, "qwen2", chat_template=FAMILIES[family], bos_token=BOS, eos_token=EOS)
    content = json.loads((folder / "tokenizer.json").read_text())
    known = {token["content"] for token in content["added_tokens"]}
    first = max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
    strings = dict.fromkeys(s for group in SPECIALS for s in group if s not in known)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": first + i, "content": s, "special": True, **flags} for i, s in enumerate(strings)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


# What differs is where BOS and the system message go, and how the mask is found; all families are rendered elsewhere.
@pytest.mark.parametrize("family", exhaustive_but(("qwen2", "llama3", "mistral-last", "gemma", "generation"), FAMILIES))
def test_an_imported_template_is_compared_with_its_own_output(family: str, tmp_path: Path):
    rung = ids.run(compared(with_template(tmp_path / "source", family), tmp_path))
    assert told(rung) == []
    assert text_probe.PLAIN[0] in [str(f.where) for f in rung.findings if f.tap == ids.TEMPLATE]


Rewrite = Callable[[Text, Any, Rendered], Rendered]
MISTAKES: dict[str, tuple[str, Rewrite]] = {
    "a token lost": ("text.template", lambda text, m, made: Rendered(made.ids[:-1], made.mask[:-1])),
    "typed text as control": (
        "text.template",
        lambda text, m, made: _rendered(text, [{**m[0], "content": m[0]["content"] + "<|im_end|>"}, *m[1:]], made),
    ),
    "prompts trained": ("text.mask", lambda text, m, made: Rendered(made.ids, [1] * len(made.ids))),
    "end not trained": ("text.mask", lambda text, m, made: Rendered(made.ids, [*made.mask[1:], 0])),
}


def _rendered(text: Text, messages: Any, made: Rendered) -> Rendered:
    found = oracle_text.render(text, messages)
    return found if len(found.ids) != len(made.ids) else made


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_rendering_of_an_imported_template_is_found(mistake: str, tmp_path: Path):
    comparison = compared(with_template(tmp_path / "source", "chatml"), tmp_path)
    tap, change = MISTAKES[mistake]

    def wrong(text: Text, messages: Any) -> Rendered:
        return change(text, messages, oracle_text.render(text, messages))

    broken = dataclasses.replace(comparison, candidate=ids.with_text(comparison.candidate, render=wrong))
    failed = [finding for finding in ids.run(broken).findings if not finding.ok]
    assert failed[0].tap == tap
    substitute = ids.site(broken, failed[0]).substitute()
    assert substitute is not None


def test_what_a_template_does_not_show_is_said(tmp_path: Path):
    source = with_template(tmp_path / "source", "chatml")
    comparison = compared(source, tmp_path)
    exposed, hidden = exposure.classes(comparison, [ids.NAME])
    assert {"turn not ended", "last reply only", exposure.WRONG_RULE} <= set(exposed)
    alone = dataclasses.replace(comparison, source=None)
    assert exposure.classes(alone, [ids.NAME])[1][exposure.WRONG_RULE] == exposure.NO_SOURCE_TEXT
    assert not hidden.keys() & {"turn not ended", "last reply only"}


def test_a_template_that_shouts_is_said_not_to_be_compared(tmp_path: Path):
    shouting = FAMILIES["chatml"].replace("message.content", "message.content | upper")
    small.as_json(tmp_path / "source", "qwen2", chat_template=shouting)
    comparison = compared(tmp_path / "source", tmp_path)
    assert problems(comparison) == []
    assert set(exposure.classes(comparison, [ids.NAME])[1].values()) >= {exposure.UNSEEN_CONTENTS}
