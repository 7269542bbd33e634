"""The product's table of ops may itself be wrong: what an op should read is found in the reference's own taps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxgpt import taps
from jaxgpt.config import ModelConfig
from jaxgpt.taps import Op, Wiring
from oracle import diagnosis, models
from oracle.comparison import Comparison
from oracle.noise import stored_calibration
from oracle.reference import Reference
from oracle.results import Report

pytestmark = pytest.mark.slow

RUNGS = ("operators", "forward", "loss", "decode")


def bisected(family: str, place: Path, rungs: tuple[str, ...]) -> Report:
    """A model of no other test: what is compiled for a config is compiled with its table."""
    sizes = {
        "gpt2": {"n_layer": 2, "n_inner": 61, "n_positions": 24},
        "llama": {"num_hidden_layers": 2, "intermediate_size": 61, "max_position_embeddings": 24},
    }
    folder = models.write(models.MODELS[family] | sizes[family], place, "float32", 3)
    candidate, reference = models.candidate(folder, "float32"), Reference.load(folder, "float32")
    comparison = Comparison(candidate, reference, folder, folder, stored_calibration(), 3)
    return diagnosis.bisect(comparison, rungs=rungs)


@pytest.mark.exhaustive
def test_a_wrong_row_is_named_and_its_repair_reaches_training_and_cached_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    own = taps.mlp_ops

    def wrong(config: ModelConfig, layer: int, wiring: Wiring) -> Iterator[Op]:
        for op in own(config, layer, wiring):
            bypassing = op.tap.endswith("mlp.up")
            yield replace(op, inputs=(f"layers.{layer}.attn_residual",)) if bypassing else op

    monkeypatch.setattr(taps, "mlp_ops", wrong)
    report = bisected("gpt2", tmp_path, RUNGS)
    (cause,) = report.causes
    assert (cause.name, cause.rung, cause.tap, cause.proved) == ("norm bypassed", "forward", "layers.0.mlp.up", True)
    assert "the row of layers.0.mlp.up in jaxgpt/taps.py must name layers.0.mlp_norm" in cause.advice
    assert report.repaired is not None
    assert [(rung.name, rung.verdict) for rung in report.repaired.rungs] == [(name, "pass") for name in RUNGS[1:]]


def test_a_wrong_row_of_cached_steps_alone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    own = taps.attention_ops

    def wrong(config: ModelConfig, layer: int, wiring: Wiring, stream: str) -> Iterator[Op]:
        for op in own(config, layer, wiring, stream):
            _, *others = op.inputs
            early = op.tap.endswith("attn.keys")
            yield replace(op, inputs=(f"layers.{layer}.attn.k_heads", *others)) if early else op

    monkeypatch.setattr(taps, "attention_ops", wrong)
    report = bisected("llama", tmp_path, ("forward", "decode"))
    (cause,) = report.causes
    assert (cause.name, cause.rung, cause.tap) == ("keys stored before RoPE", "decode", "layers.0.attn.keys")
    assert cause.proved
    assert "the row of layers.0.attn.keys in jaxgpt/taps.py must name layers.0.attn.k_rope" in cause.advice
