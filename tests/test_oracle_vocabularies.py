"""The rung of ids on vocabularies of other programs: true ones pass, a wrong rule and a missing BOS are found."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import small_vocabularies as small
from conftest import GPT2, random_params

from jaxgpt import checkpoint
from jaxgpt.checkpoint import Contents
from jaxgpt.formats import hf, hf_tokenizer
from oracle import noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
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


def problems(comparison: Comparison) -> list[str]:
    return [f"{f.tap}: {f.problem}" for f in ids.run(comparison).findings if not f.ok]


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
    assert problems(comparison) == []
    assert "against the reference folder's tokenizer and the tokenizer of its own export" in ids.run(comparison).summary


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
