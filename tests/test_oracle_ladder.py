"""The oracle against true models, which must pass, and planted faults, which must be located exactly."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgpt import ops as true_ops
from oracle import exposure, ladder, models, noise, probe
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.faults import FAULTS, Fault
from oracle.faults.catalogue import CATALOGUE
from oracle.reference import Reference
from oracle.reports import terminal
from oracle.results import VERSION, Report

TWO_LAYERS = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 2, "n_positions": probe.EDGE + 2},
    "llama": models.MODELS["llama-square-biased-tied-linear"] | {"num_hidden_layers": 2, "max_position_embeddings": 40},
}
"""The cache of the first grows, that of the second does not."""
ONE_LAYER = {
    "gpt2": TWO_LAYERS["gpt2"] | {"n_layer": 1},
    "llama": TWO_LAYERS["llama"] | {"num_hidden_layers": 1},
}
"""For the whole ladder: layers are alike, and compiling them takes long."""
SEED = 4321
"""Of weights and probes; no calibration run had it."""

Compare = Callable[..., Report]


@dataclasses.dataclass(frozen=True)
class Case:
    """A true model in one dtype, and how to compare an altered one with it."""

    dtype: str
    folder: Path
    candidate: Candidate
    reference: Reference
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Of the ops that are as they were in an earlier comparison."""

    def compare(self, candidate: Candidate | None = None, **options: Any) -> Report:
        chosen = candidate or self.candidate
        folders, limits = (self.folder, self.folder), noise.stored_calibration()
        comparison = Comparison(chosen, self.reference, *folders, limits, SEED, measured=self.measured)
        return ladder.climb(comparison, **options)


def load(config: models.Config, dtype: str, folder: Path) -> Case:
    models.write(config, folder, dtype, SEED)
    return Case(dtype, folder, models.candidate(folder, dtype), Reference.load(folder, dtype))


SLOW = [
    pytest.param("llama-bfloat16", marks=pytest.mark.slow),
    *(
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.exhaustive])
        for name in ("llama-float32", "gpt2-bfloat16")
    ),
]
"""`make equivalence` climbs the ladder with every model in both dtypes."""


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forced steps show every fault planted here; true models are decoded to the edge."""
    _decode(monkeypatch, lambda made: {"forced": [dataclasses.replace(made.forced[0], ids=made.forced[0].ids[:2])]})


@pytest.fixture
def short_decoding(short_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two greedy ones, of the same shapes."""
    _decode(monkeypatch, lambda made: {"prompts": made.forced[0].prompts, "new_tokens": [2] * 3})


def _decode(monkeypatch: pytest.MonkeyPatch, change: Callable[[probe.DecodeProbe], Any]) -> None:
    before = probe.decoding

    def decoding(*arguments: Any) -> probe.DecodeProbe:
        made = before(*arguments)
        return dataclasses.replace(made, **change(made))

    monkeypatch.setattr(probe, "decoding", decoding)


@pytest.fixture(scope="module", params=["gpt2-float32", *SLOW])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, dtype = request.param.split("-")
    return load(TWO_LAYERS[family], dtype, tmp_path_factory.mktemp(request.param))


def place(found: Report) -> tuple[str, str, str]:
    first = found.first_divergence()
    assert first is not None
    return first["rung"], first["tap"], first["where"]


# -- True models -----------------------------------------------------------------------


# Llama's in bfloat16 is climbed in make test with a window, with biases and scaled RoPE: test_oracle_architectures.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", "float32"),
        *(
            pytest.param(*pair, marks=pytest.mark.exhaustive)
            for pair in (("llama", "bfloat16"), ("llama", "float32"), ("gpt2", "bfloat16"))
        ),
    ],
)
def test_a_true_model_passes_every_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str):
    _decode(monkeypatch, lambda made: {"prompts": made.prompts[:8], "new_tokens": made.new_tokens[:8]})
    found = load(ONE_LAYER[family], dtype, tmp_path).compare()
    assert [rung.name for rung in found.rungs] == [*ladder.LADDER][:-1], "it has no golden prompts"
    assert found.verdict == "pass", terminal.verdict(found)
    assert terminal.exit_code(found) == 0
    if dtype == "float32":
        assert next(f.error for rung in found.rungs for f in rung.findings if f.op == "kl") < 1e-8


def test_every_op_of_every_layer_is_compared(case: Case):
    (rung,) = case.compare(rungs=("operators",)).rungs
    by_layer = [{f.tap.split(".", 2)[2] for f in rung.findings if f.layer == layer} for layer in (0, 1)]
    assert by_layer[0] == by_layer[1]
    assert {"attn.q", "attn.masked", "attn.context", "mlp.act", "mlp_residual"} <= by_layer[0]


# -- Planted faults --------------------------------------------------------------------


@pytest.mark.usefixtures("short_decoding")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_located_exactly(case: Case, fault: Fault):
    if not fault.applies(case.candidate.config):
        pytest.skip(f"{fault.name} does not exist in this family")
    found = case.compare(fault.plant(case.candidate), rungs=("bits", "operators", "decode"))
    assert place(found)[:2] == (fault.rung, fault.tap(case.candidate.config))
    assert terminal.exit_code(found) == 1
    broken = found.broken
    assert broken is not None
    assert found.rungs[-1] is broken, "stops at the first broken rung"


@pytest.mark.parametrize("fault", FAULTS[:2], ids=lambda fault: fault.name)
def test_wrong_weights_are_also_located_by_what_they_compute(case: Case, fault: Fault):
    found = case.compare(fault.plant(case.candidate), rungs=("operators",))
    (rung,) = found.rungs
    assert place(found)[:2] == ("operators", fault.tap(case.candidate.config))
    assert sum(not finding.ok for finding in rung.findings) == 1, "no other op is blamed"


@pytest.mark.usefixtures("short_decoding")
def test_the_first_step_after_the_prefill_is_named_for_a_cache_fault(case: Case):
    off_by_one = FAULTS[-1].plant(case.candidate)
    assert place(case.compare(off_by_one, rungs=("decode",)))[2] == "step 1"


# -- Nothing is skipped ----------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path: Path) -> Case:
    return load(TWO_LAYERS["gpt2"], "float32", tmp_path)


def test_taps_that_the_candidate_lacks_are_failures(gpt2: Case):
    config = dataclasses.replace(gpt2.candidate.config, num_hidden_layers=1)
    shallow = dataclasses.replace(gpt2.candidate, config=config)
    for rung in ("operators", "forward"):
        problems = [f.problem for f in gpt2.compare(shallow, rungs=(rung,)).rungs[0].findings if not f.ok]
        assert "the candidate has no such tap" in problems, rung


def test_taps_that_the_reference_lacks_are_failures(gpt2: Case):
    config = dataclasses.replace(gpt2.candidate.config, num_hidden_layers=3)
    stored = dict(gpt2.candidate.stored)
    stored |= {name.replace("layers.1.", "layers.2."): array for name, array in stored.items() if "layers.1." in name}
    deep = dataclasses.replace(gpt2.candidate, config=config, stored=stored)
    for rung in ("operators", "forward"):
        found = gpt2.compare(deep, rungs=(rung,))
        assert place(found)[1] in ("layers.2.attn_norm", "final_norm"), rung
        assert any(f.problem == "the reference has no such tap" for f in found.rungs[0].findings)


def test_a_nan_is_a_failure_where_it_arises(gpt2: Case):
    def norm(config: Any, p: Any, x: Any) -> Any:
        return true_ops.norm(config, p, x).at[0, 3, 2].set(jnp.nan)

    altered = dataclasses.replace(gpt2.candidate, replace={"layers.1.mlp_norm": norm})
    found = gpt2.compare(altered, rungs=("operators",))
    assert place(found)[1] == "layers.1.mlp_norm"
    assert terminal.verdict(found).endswith("The candidate has NaN or infinite values.")


def test_an_op_that_cannot_take_the_reference_inputs_is_a_failure_not_a_crash(gpt2: Case):
    stored = {**gpt2.candidate.stored, "layers.0.mlp.down.kernel": np.zeros((7, 36), np.float32)}
    found = gpt2.compare(dataclasses.replace(gpt2.candidate, stored=stored), rungs=("operators",))
    assert place(found)[1] == "layers.0.mlp.down"


def test_all_goes_on_after_a_broken_rung(gpt2: Case):
    planted = FAULTS[0].plant(gpt2.candidate)
    stopped = gpt2.compare(planted, rungs=("bits", "operators"))
    whole = gpt2.compare(planted, rungs=("bits", "operators"), everything=True)
    assert [rung.name for rung in stopped.rungs] == ["bits"]
    assert [rung.verdict for rung in whole.rungs] == ["fail", "fail"]
    assert place(whole) == place(stopped)


# -- Greedy tokens ---------------------------------------------------------------------


def greedy_findings(found: Report) -> list[Any]:
    return [finding for finding in found.rungs[0].findings if finding.op == "greedy"]


@pytest.mark.usefixtures("short_decoding")
def test_a_wrong_greedy_token_outside_the_noise_is_a_failure(gpt2: Case, monkeypatch: pytest.MonkeyPatch):
    true = Candidate.greedy

    def second_is_wrong(candidate: Candidate, *arguments: Any) -> list[list[int]]:
        tokens = true(candidate, *arguments)
        tokens[1][1] = (tokens[1][1] + 1) % 131
        return tokens

    monkeypatch.setattr(Candidate, "greedy", second_is_wrong)
    found = gpt2.compare(rungs=("decode",))
    wrong = greedy_findings(found)[1]
    assert [finding for finding in greedy_findings(found) if not finding.ok] == [wrong]
    assert next(token for token in found.rungs[0].tokens if token.outcome == "wrong").step == 1
    assert wrong.where == "greedy, prompt 1"
    assert wrong.problem.startswith("greedy token 1 is ")
    assert "outside the noise" in wrong.problem


@pytest.mark.usefixtures("short_steps")
def test_a_token_whose_margin_is_inside_the_noise_is_a_certified_tie(gpt2: Case, monkeypatch: pytest.MonkeyPatch):
    rows = np.repeat(np.asarray(gpt2.candidate.stored["embed.tokens.weight"])[:1], 131, axis=0)
    towards = np.random.default_rng(0).choice([-9, 9], rows.shape).astype(np.float32)
    rows = np.nextafter(rows, towards)  # one ulp apart: so are the logits
    _save_embedding(gpt2.folder, rows)
    flat = dataclasses.replace(gpt2.candidate, stored={**gpt2.candidate.stored, "embed.tokens.weight": rows})
    reference = Reference.load(gpt2.folder, "float32")

    def least_likely(_: Candidate, prompts: Any, new_tokens: Any) -> list[list[int]]:
        return [[int(reference.truth.logits(np.array([ids]))[0, -1].argmin())] for ids in prompts]

    monkeypatch.setattr(Candidate, "greedy", least_likely)
    found = Case("float32", gpt2.folder, flat, reference).compare(rungs=("decode",))
    assert all(finding.ok for finding in greedy_findings(found))
    assert "0 of 32 greedy tokens exact, 32 certified ties" in found.rungs[0].summary


def _save_embedding(folder: Path, embedding: np.ndarray) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.from_numpy(embedding)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- Caches and masks ------------------------------------------------------------------


@pytest.mark.usefixtures("short_decoding")
def test_a_key_stored_in_the_wrong_slot_shows_in_the_keys(gpt2: Case):
    def store(config: Any, p: Any, new: Any, buffer: Any, slots: Any) -> Any:
        return true_ops.store(config, p, new, buffer, slots + (slots.shape[1] == 1))

    found = gpt2.compare(dataclasses.replace(gpt2.candidate, replace={"layers.1.attn.keys": store}), rungs=("decode",))
    assert place(found) == ("decode", "layers.1.attn.keys", "step 1")


@pytest.mark.usefixtures("short_decoding")
def test_an_unmasked_slot_shows_in_the_mask(gpt2: Case):
    def mask(*arguments: Any) -> Any:
        return jnp.ones_like(true_ops.attention_mask(*arguments))

    altered = dataclasses.replace(gpt2.candidate, replace={"attention_mask": mask})
    assert place(gpt2.compare(altered, rungs=("operators",)))[:2] == ("operators", "mask")
    assert place(gpt2.compare(altered, rungs=("decode",)))[:2] == ("decode", "mask")


# -- Environment, report ---------------------------------------------------------------


def test_reduced_precision_or_training_mode_is_inconclusive(gpt2: Case):
    gpt2.reference.peer.decoder.train()
    found = gpt2.compare()
    gpt2.reference.peer.decoder.eval()
    assert found.verdict == "inconclusive"
    assert terminal.exit_code(found) == 3
    assert terminal.verdict(found).startswith("INCONCLUSIVE. The reference is in training mode")
    torch.set_float32_matmul_precision("medium")
    try:
        assert "matmul precision is medium" in terminal.verdict(gpt2.compare())
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_candidate_that_does_not_repeat_itself_is_inconclusive(gpt2: Case):
    counter = iter(range(100))

    def norm(config: Any, p: Any, x: Any) -> Any:
        offset = jax.pure_callback(lambda: np.float32(1e-3 * next(counter)), jax.ShapeDtypeStruct((), np.float32))
        return true_ops.norm(config, p, x) + offset

    found = gpt2.compare(dataclasses.replace(gpt2.candidate, replace={"final_norm": norm}))
    assert "does not repeat itself" in terminal.verdict(found)


def test_the_report_says_in_words_and_json_where_the_difference_begins(gpt2: Case):
    epsilon = next(fault for fault in FAULTS if fault.name == "norm epsilon")
    found = gpt2.compare(epsilon.plant(gpt2.candidate), rungs=("bits", "operators"))
    text = "\n".join(terminal.lines(found))
    assert text.startswith("FAIL. First divergence: layers.0.attn_norm, op norm")
    assert "(its inputs are clean). Local error" in text
    assert "times the noise" in text
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["version"] == VERSION
    assert document["verdict"] == "fail"
    assert document["first_divergence"]["layer"] == 0
    assert document["first_divergence"]["op"] == "norm"
    assert document["causes"] == []
    assert {"jax", "torch", "dtype", "config", "calibrated_with"} <= document["environment"].keys()


def test_without_a_source_wrong_weights_are_listed_as_hidden(gpt2: Case):
    calibration = noise.stored_calibration()
    comparison = Comparison(gpt2.candidate, gpt2.reference, gpt2.folder, None, calibration)
    found = ladder.climb(comparison, rungs=("bits",))
    assert found.hidden["kernel transposed"] == "no --reference folder to compare the weights with"
    assert found.hidden["cache offset"] == "the rung decode was not reached"


def test_exposed_are_the_classes_of_the_catalogue_that_the_model_has(gpt2: Case):
    comparison = Comparison(gpt2.candidate, gpt2.reference, gpt2.folder, gpt2.folder, noise.stored_calibration())
    exposed, hidden = exposure.classes(comparison, tuple(ladder.LADDER))
    assert {"kernel transposed", "norm epsilon", "cache offset", "Adam's betas"} <= set(exposed)
    assert hidden["RoPE interleaved"] == "exists only where positions are rotations"
    assert hidden["roles swapped"] == "the checkpoint has no tokenizer"
    assert {*exposed, *hidden} == {fault.name for fault in CATALOGUE}
    assert all(reason != "exists only where " for reason in hidden.values())
