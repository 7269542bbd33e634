"""A config field in which checkpoint and reference differ is told in words, also where no number shows it."""

import dataclasses
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.config import RopeScaling
from oracle import config_fields, diagnosis, ladder, models, noise, subject
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.reports import page, terminal
from oracle.results import Report

LLAMA = models.MODELS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": 24}
Make = Callable[..., Comparison]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A true comparison of a model of `models`."""

    def make(config: models.Config, dtype: str = "float32") -> Comparison:
        folder = models.write(config, tmp_path_factory.mktemp("config"), dtype)
        calibration = noise.stored_calibration()
        parts = models.candidate(folder, dtype), Reference.load(folder, dtype), folder, folder
        return Comparison(*parts, calibration, 3)

    return make


def altered(comparison: Comparison, **fields: Any) -> Comparison:
    candidate = comparison.candidate
    config = dataclasses.replace(candidate.config, **fields)
    return dataclasses.replace(comparison, candidate=dataclasses.replace(candidate, config=config))


@pytest.mark.parametrize("name", models.MODELS)
def test_no_field_of_a_true_model_differs(made: Make, name: str):
    config = models.MODELS[name]
    comparison = made(config | ({"n_layer": 1} if "n_layer" in config else {"num_hidden_layers": 1}))
    assert config_fields.findings(comparison) == []
    assert config_fields.findings(dataclasses.replace(comparison, source=None, export=None)) == []


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("llama", {"max_position_embeddings": 128}, "the checkpoint has 128, the reference's config.json says 96"),
        ("llama", {"rms_norm_eps": 1e-6}, "has 1e-06, the reference's config.json says 1e-05"),
        ("llama", {"rope_theta": 20000.0}, "has 20000.0, the reference's config.json says 10000.0"),
        ("llama", {"tie_word_embeddings": True}, "has True, the reference's config.json says False"),
        ("llama", {"hidden_act": "gelu"}, "has gelu, the reference's config.json says silu"),
        ("llama", {"num_attention_heads": 2}, "has 2, the reference's config.json says 6"),
        ("llama", {"vocab_size": 132}, "has 132, the reference's config.json says 131"),
        ("llama3-scaling", {"rope_scaling": None}, "has no scaling, the reference's config.json says llama3 (factor 8"),
        (
            "llama3-scaling",
            {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
            "original_max_position_embeddings 64), the reference's",
        ),
        ("gpt2", {"hidden_act": "gelu"}, "has gelu, the reference's config.json says gelu_new"),
        ("gpt2", {"norm": "rmsnorm"}, "has rmsnorm, the reference's config.json says layernorm"),
        ("qwen2-tied", {"qkv_bias": False}, "has False, the reference's config.json says True"),
    ],
)
def test_each_field_that_differs_is_told_in_words(made: Make, name: str, fields: dict[str, Any], told: str):
    (found,) = config_fields.findings(altered(made(models.MODELS[name]), **fields))
    assert found.tap == f"config.{next(iter(fields))}"
    assert not found.ok
    assert told in found.problem


def test_what_a_kind_of_scaling_does_not_read_is_no_difference(made: Make):
    linear = made(models.MODELS["llama-square-biased-tied-linear"])
    assert config_fields.findings(altered(linear, rope_scaling=RopeScaling("linear", 4.0, 2.0, 3.0, 5))) == []
    assert config_fields.findings(altered(made(LLAMA), rope_scaling=RopeScaling("llama3", 1.0))) == []


def test_a_context_that_config_json_leaves_out_is_that_of_transformers(made: Make):
    config = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    assert config_fields.findings(made(config)) == []
    (found,) = config_fields.findings(altered(made(config), max_position_embeddings=4096))
    assert found.problem == "the checkpoint has 4,096, the reference's config.json says 2,048"


@pytest.mark.parametrize(
    ("ours", "config", "told"),
    [
        ((5,), {"eos_token_id": 7}, "the checkpoint has [5], the reference's config.json says [7]"),
        ((), {"eos_token_id": [7, 3]}, "the checkpoint has none, the reference's config.json says [3, 7]"),
        ((5,), {}, "the checkpoint has [5], the reference's config.json says none"),
        ((3, 7), {"eos_token_id": [7, 3]}, None),
        ((), {"eos_token_id": 50256}, None),
        (None, {"eos_token_id": 7}, None),
    ],
)
def test_the_ids_that_end_a_text_are_compared_where_no_tokenizer_has_them(
    made: Make, ours: tuple[int, ...] | None, config: dict[str, Any], told: str | None
):
    comparison = dataclasses.replace(made(LLAMA | config), stop_ids=ours)
    found = [(finding.tap, finding.problem) for finding in config_fields.findings(comparison)]
    assert found == ([("config.eos_token_ids", told)] if told else [])


def test_a_checkpoint_gives_the_ids_that_end_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    climb = ladder.climb
    monkeypatch.setattr(ladder, "climb", lambda comparison, **_: climb(comparison, rungs=("forward",)))
    folders = [models.write(LLAMA | {"eos_token_id": id}, tmp_path / str(id), "float32", seed=5) for id in (5, 7)]
    subject.import_folder(folders[0], tmp_path / "run")
    limits = noise.stored_calibration()
    shown = [subject.compare(tmp_path / "run", folder, "float32", limits).verdict for folder in folders]
    assert shown == ["pass", "fail"]


# -- In the ladder ---------------------------------------------------------------------


@pytest.mark.parametrize("context", [pytest.param(20, marks=pytest.mark.exhaustive), 32])
def test_another_context_fails_in_words_with_its_cause(made: Make, context: int):
    other = altered(made(LLAMA), max_position_embeddings=context)
    report = diagnosis.bisect(other, rungs=("operators", "forward"))
    assert next(terminal.lines(report)) == (
        "FAIL. First divergence: config.max_position_embeddings, a config field, in the rung forward. "
        f"The checkpoint has {context}, the reference's config.json says 24."
    )
    (cause,) = report.causes
    assert cause.name == "config field max_position_embeddings differs from the folder's"
    assert cause.proved
    assert not cause.tied
    text = html.unescape(re.sub("<[^>]+>", "", page.render(report))).replace("’", "'")
    assert "config.max_position_embeddings · a config field · rung forward. The checkpoint has" in text


def test_two_fields_are_two_causes(made: Make):
    comparison = altered(made(LLAMA), max_position_embeddings=20, rms_norm_eps=1.0000001e-5)
    report = diagnosis.bisect(comparison, rungs=("forward",))
    assert [cause.tap for cause in report.causes] == ["config.rms_norm_eps", "config.max_position_embeddings"]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


def test_what_an_op_shows_is_not_told_twice(made: Make):
    other = altered(made(LLAMA), rms_norm_eps=1e-3, max_position_embeddings=20)
    report: Report = ladder.climb(other, rungs=("forward",))
    assert report.verdict == "fail"
    assert [found.tap for rung in report.rungs for found in rung.findings if found.tap.startswith("config.")] == []
