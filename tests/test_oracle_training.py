"""Training parity: the product must pass, and every planted way of training wrongly must be found where it begins."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import loss as product_loss
from jaxgpt import model, train_step
from jaxgpt import optimizer as product_optimizer
from oracle import diagnosis, ladder, lesson, models, training, training_probe, training_reference
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.reference import Reference
from oracle.results import Cause, Report
from oracle.rungs import gradients, loss, optimizer
from oracle.training_site import trained

pytestmark = pytest.mark.slow

RUNGS = (loss.NAME, gradients.NAME, optimizer.NAME)
OPS = ("token_losses", "mean_loss", "kernel", "weight", "bias", "learning_rate")
LIMITS = Calibration(
    1.0, {rung: {dtype: dict.fromkeys(OPS, (8.0, 16.0)) for dtype in ("float32", "bfloat16")} for rung in RUNGS}, {}
)
"""Several times what clean runs reach; the stored limits are another test's business."""
ONE_LAYER = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 1},
    "llama": models.MODELS["llama-square-biased-tied-linear"] | {"num_hidden_layers": 1},
}
SEED = 77


@dataclass(frozen=True)
class Case:
    """A true model, and how to compare an altered one with it."""

    candidate: Candidate
    reference: Reference

    def comparison(self, candidate: Candidate | None = None) -> Comparison:
        return Comparison(candidate or self.candidate, self.reference, None, None, LIMITS, SEED)

    def compare(self, candidate: Candidate | None = None, rungs: tuple[str, ...] = RUNGS, **options: Any) -> Report:
        return ladder.climb(self.comparison(candidate), rungs=rungs, **options)

    def cause(self, candidate: Candidate, rung: str) -> Cause:
        report = diagnosis.bisect(self.comparison(candidate), rungs=(rung,))
        assert len(report.causes) == 1, report.causes
        return report.causes[0]


def load(family: str, dtype: str, place: Path) -> Case:
    folder = models.write(ONE_LAYER[family], place, dtype, SEED)
    return Case(models.candidate(folder, dtype), Reference.load(folder, dtype))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return load("gpt2", "float32", tmp_path_factory.mktemp("gpt2"))


def place(found: Report) -> tuple[str, str]:
    first = found.first_divergence()
    assert first is not None
    return first["rung"], first["tap"]


# -- True models -----------------------------------------------------------------------

HEAVY = [
    pytest.param(family, dtype, marks=pytest.mark.exhaustive)
    for family, dtype in (("llama", "bfloat16"), ("llama", "float32"), ("gpt2", "bfloat16"))
]
"""For `make test-all`."""


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float32"), *HEAVY])
def test_the_product_trains_as_the_reference_does(family: str, dtype: str, tmp_path: Path):
    case = load(family, dtype, tmp_path)
    found = case.compare()
    assert found.verdict == "pass", found.first_divergence()
    by_rung = {rung.name: rung for rung in found.rungs}
    names = {finding.tap for finding in by_rung["gradients"].findings}
    assert names == set(case.candidate.stored) == {f.tap for f in by_rung["optimizer"].findings} - {"learning_rate"}
    if dtype == "float32":
        zero = lambda f: f.tap.endswith("k.bias") and family == "gpt2"  # noqa: E731
        assert max(f.error for f in by_rung["gradients"].findings if not zero(f)) < 1e-5
    last = [f.error for f in by_rung["optimizer"].findings if f.where == "step 20" and not f.tap.endswith("k.bias")]
    assert np.linalg.norm(last) < 1e-4


def test_a_large_models_gradients_are_compared_layer_by_layer_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training_probe, "LARGE", 0)
    folder = models.write(models.MODELS["gpt2"], tmp_path, "float32", SEED)
    case = Case(models.candidate(folder, "float32"), Reference.load(folder, "float32"))
    batches = lesson.gradient_batches(lesson.whole(case.comparison()))
    assert len(batches) == 1
    _, ours = training_reference.gradients(case.reference.peer.decoder, batches)
    ours["layers.1.attn.q.kernel"] = ours["layers.1.attn.q.kernel"] * 1.001
    del ours["layers.0.mlp.up.bias"]
    altered = trained(case.candidate, gradients=lambda *_: (0.0, ours))
    (rung,) = case.compare(altered, (gradients.NAME,)).rungs
    assert {f.tap for f in rung.findings} == set(case.candidate.stored)
    assert rung.findings[0].tap == "final_norm.bias", "the order is that of backpropagation"
    broken = {f.tap: f.problem for f in rung.findings if not f.ok}
    assert broken == {"layers.1.attn.q.kernel": "", "layers.0.mlp.up.bias": "the candidate has no gradient of it"}
    assert "one micro-batch" in rung.summary
    assert "3 are zero in truth" in rung.summary


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.exhaustive), "llama"])
def test_a_large_models_first_layer_is_optimized(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_probe, "LARGE", 0)
    monkeypatch.setattr(training_probe, "PART_IDS", 40)
    case = load(family, "float32", tmp_path)
    (rung,) = case.compare(rungs=(optimizer.NAME,)).rungs
    assert rung.verdict == "pass", rung.first
    assert "first layer and first ids only" in rung.summary


def test_a_key_bias_that_gets_a_gradient_is_found_although_the_truth_is_zero(gpt2: Case):
    asked = lesson.whole(gpt2.comparison())
    (_, truth), (_, ours) = lesson.gradients(gpt2.reference, asked.corpus, asked.settings)
    bias, scale = "layers.0.attn.k.bias", np.abs(truth["layers.0.attn.q.bias"]).mean()
    assert np.abs(truth[bias]).max() < 1e-12 < np.abs(ours[bias]).max()

    def verdict(added: float) -> str:
        found = {**ours, bias: ours[bias] + added}
        altered = trained(gpt2.candidate, gradients=lambda *_: (0.0, found))
        return gpt2.compare(altered, (gradients.NAME,)).verdict

    assert (verdict(0.0), verdict(1e-4 * scale)) == ("pass", "fail")


# -- Planted faults --------------------------------------------------------------------

Plant = Callable[[Candidate], Candidate]


def packing(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Plant:
    """Something wrong in every micro-batch."""

    def packer(corpus: Any, settings: Any) -> list[Any]:
        batches: list[Any] = training.batches(corpus, settings)
        return [batch | change(batch) for batch in batches]

    return lambda candidate: trained(candidate, batches=packer)


def across_documents(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    following = np.roll(batch["ids"], -1, axis=1)
    ends = (batch["mask"] == 0) & (np.roll(batch["segments"], -1, axis=1) == batch["segments"] + 1)
    return {"targets": np.where(ends, following, batch["targets"]), "mask": np.where(ends, 1.0, batch["mask"])}


def all_flags(candidate: Candidate) -> Candidate:
    def packer(corpus: training_probe.Corpus, settings: Any) -> list[Any]:
        episodes = tuple((ids, (1,) * len(ids)) for ids, _ in corpus.episodes)
        return training.batches(training_probe.Corpus(corpus.documents, episodes), settings)

    return trained(candidate, batches=packer)


def zero_filled(array: np.ndarray, by: int) -> np.ndarray:
    moved = np.roll(array, by, axis=1)
    moved[:, slice(0, by) if by > 0 else slice(by, None)] = 0
    return moved


def with_dropout(candidate: Candidate) -> Candidate:
    def losses(config: Any, params: Any, batch: Any, dtype: str) -> Any:
        given = {name: batch[name] for name in ("positions", "segments")}
        output = model.forward(config, model.cast(params, dtype), batch["ids"], rng=jax.random.key(0), **given)
        return product_loss.token_losses(output.logits, batch["targets"])

    return trained(candidate, losses=jax.jit(losses, static_argnums=(0, 3)))


def per_micro_batch(candidate: Candidate) -> Candidate:
    def mean_of_means(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        parts = [
            training.gradients(
                config, settings, dtype, state, {name: array[i : i + 1] for name, array in batches.items()}
            )
            for i in range(batches["ids"].shape[0])
        ]
        return jax.tree.map(lambda *values: sum(values) / len(values), *parts)

    return trained(candidate, gradients=mean_of_means)


PACKING: dict[str, tuple[Plant, str, str]] = {
    "label shift missing": (packing(lambda b: {"targets": b["ids"]}), "batch.targets", ""),
    "label shift missing, rolled": (
        packing(lambda b: {"targets": np.roll(b["targets"], 1, axis=1)}),
        "batch.targets",
        "label shift missing",
    ),
    "label shift doubled": (packing(lambda b: {"targets": np.roll(b["targets"], -1, axis=1)}), "batch.targets", ""),
    "label shift doubled, lost": (
        packing(lambda b: {"targets": zero_filled(b["targets"], -1)}),
        "batch.targets",
        "label shift doubled",
    ),
    "loss mask off by one": (packing(lambda b: {"mask": np.roll(b["mask"], 1, axis=1)}), "batch.mask", ""),
    "loss mask off by one, back": (
        packing(lambda b: {"mask": zero_filled(b["mask"], -1)}),
        "batch.mask",
        "loss mask off by one",
    ),
    "loss mask off by one, lost": (
        packing(lambda b: {"mask": zero_filled(b["mask"], 1)}),
        "batch.mask",
        "loss mask off by one",
    ),
    "padding trained": (
        packing(lambda b: {"mask": np.where(b["segments"] == 0, 1.0, b["mask"])}),
        "batch.mask",
        "",
    ),
    "first token of a document predicted from the document before": (packing(across_documents), "batch.mask", ""),
    "loss over prompt tokens too": (all_flags, "batch.mask", ""),
}


@pytest.mark.parametrize("name", PACKING)
def test_a_wrong_batch_is_named_by_what_undoes_it(gpt2: Case, name: str):
    plant, tap, cause = PACKING[name]
    altered = plant(gpt2.candidate)
    comparison = gpt2.comparison(altered)
    asked = lesson.whole(comparison)
    findings = loss.batch_findings(asked, lesson.micro_batches(asked))
    first = next(finding for finding in findings if not finding.ok)
    assert first.tap == tap
    rung = ladder.run_rung(loss.NAME, comparison)
    found, repaired = diagnosis.explain(comparison, rung)
    assert (found.name, found.tied) == (cause or name, [])
    assert repaired is not None
    assert ladder.run_rung(loss.NAME, gpt2.comparison(repaired)).verdict == "pass"


FUNCTIONS: dict[str, tuple[Plant, str, str]] = {
    "dropout left on": (with_dropout, loss.NAME, loss.TOKENS),
    "gradient accumulation normalised per micro-batch": (per_micro_batch, loss.NAME, loss.MEAN),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_loss_is_named_by_what_undoes_it(gpt2: Case, name: str):
    plant, rung, tap = FUNCTIONS[name]
    altered = plant(gpt2.candidate)
    assert place(gpt2.compare(altered, (rung,))) == (rung, tap)
    cause = gpt2.cause(altered, rung)
    assert (cause.name, cause.proved) == (name, True)


# -- Planted in the training step ------------------------------------------------------


def stepping(transform: Callable[[Any], Any], settings_of: Callable[[Any], Any] = lambda settings: settings) -> Plant:
    """A training step with another optimizer, whose state has the parts that the product's has."""

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def step(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        value, found = train_step.mean_gradients(config, settings, dtype, state, batches)
        optimizer = transform(settings_of(settings))
        updates, moments = optimizer.update(found, state.moments, state.params)
        rate = product_optimizer.schedule(settings)(schedule_count(moments) - 1)
        new = state._replace(params=optax.apply_updates(state.params, updates), moments=moments, step=state.step + 1)
        return new, train_step.StepReport(value, optax.tree.norm(found), jnp.float32(rate), jnp.bool(True))

    return lambda candidate: trained(candidate, step=step)


def schedule_count(moments: Any) -> Any:
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    (found,) = [node for node in jax.tree.leaves(moments, is_leaf=is_schedule) if is_schedule(node)]
    return found.count


def chain(settings: Any, *, clip: Any = None, mask: Any = product_optimizer.decayed) -> Any:
    """The product's optimizer with another clipping, or decay of other parameters."""
    return optax.chain(
        clip or optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            product_optimizer.schedule(settings),
            settings.beta1,
            settings.beta2,
            weight_decay=settings.weight_decay,
            mask=mask,
        ),
    )


def coupled(settings: Any) -> Any:
    """L2 added to the gradients, in place of the clipping that does nothing here."""

    def added(gradients: Any, params: Any) -> Any:
        clipped, _ = optax.clip_by_global_norm(settings.clip_norm).update(gradients, optax.EmptyState())
        decay = product_optimizer.decayed(params)
        return {n: g + settings.weight_decay * params[n] if decay[n] else g for n, g in clipped.items()}

    return chain(dataclasses.replace(settings, weight_decay=0.0), clip=optax.stateless(added))


def late_schedule(candidate: Candidate) -> Candidate:
    def counted(moments: Any, by: int) -> Any:
        is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
        move = lambda node: node._replace(count=node.count + by) if is_schedule(node) else node  # noqa: E731
        return jax.tree.map(move, moments, is_leaf=is_schedule)

    def step(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        ahead = state._replace(moments=counted(state.moments, 1))
        new, report = train_step.train_step(config, settings, dtype, ahead, batches)
        return new._replace(moments=counted(new.moments, -1)), report

    return trained(candidate, step=step)


def with_settings(**changes: Any) -> Plant:
    settings = dataclasses.replace(training_probe.SETTINGS, **changes)
    return lambda candidate: trained(candidate, settings=settings)


STEPS: dict[str, tuple[Plant, str]] = {
    "learning-rate schedule off by one": (late_schedule, "learning_rate"),
    "decay applied to norms and biases": (stepping(partial(chain, mask=None)), "layers.0.attn_norm.weight"),
    "coupled (L2) weight decay": (stepping(coupled), "embed.tokens.weight"),
    "weight decay missing": (stepping(partial(chain, mask=lambda p: dict.fromkeys(p, False))), "embed.tokens.weight"),
    "gradients not clipped by their global norm": (
        stepping(lambda s: chain(s, clip=optax.identity())),
        "embed.tokens.weight",
    ),
    "wrong betas of AdamW": (with_settings(beta2=0.99), "embed.tokens.weight"),
}


QUICK = ("decay applied to norms and biases",)
"""The others cost two compilations of a step; `make test` has them in steps that are not compiled, in
test_oracle_repairs_training.py."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in STEPS],
)
def test_a_wrong_step_is_named_by_what_undoes_it(gpt2: Case, name: str):
    plant, tap = STEPS[name]
    altered = plant(gpt2.candidate)
    report = diagnosis.bisect(gpt2.comparison(altered), rungs=(optimizer.NAME,))
    assert place(report) == (optimizer.NAME, tap)
    assert [(cause.name, cause.proved) for cause in report.causes] == [(name, True)]
    assert not report.causes[0].tied


def test_a_step_that_accumulates_wrongly_is_named_at_the_step(gpt2: Case):
    """The gradients function is right; the step has its own."""

    def step(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        counts = batches["mask"].sum(axis=(1, 2))
        weights = counts.sum() / (len(counts) * jnp.maximum(counts, 1e-6))
        # Each token weighs what it would if its micro-batch were divided by itself; the sum of masks stays.
        given = batches | {"mask": batches["mask"] * weights[:, None, None]}
        return train_step.train_step(config, settings, dtype, state, given)

    report = diagnosis.bisect(gpt2.comparison(trained(gpt2.candidate, step=step)), rungs=(optimizer.NAME,))
    assert [c.name for c in report.causes] == ["gradient accumulation normalised per micro-batch"]


@pytest.mark.exhaustive
def test_a_mistake_in_the_products_own_gradients_is_undone_in_its_steps_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The steps are replayed with the reference's gradients: those of the product would repeat the mistake."""

    def unmasked(*given: Any, **further: Any) -> Any:
        config, params, batch = given
        mask = {"mask": jnp.ones_like(batch["mask"])}
        return product_loss.masked_sum(config, params, batch | mask, **further)

    monkeypatch.setattr(train_step, "masked_sum", unmasked)
    # A model of no other test: what is compiled for a config is compiled with the mistake.
    folder = models.write(ONE_LAYER["gpt2"] | {"n_inner": 59}, tmp_path, "float32", SEED)
    case = Case(models.candidate(folder, "float32"), Reference.load(folder, "float32"))
    report = diagnosis.bisect(case.comparison(), rungs=RUNGS)
    assert [(cause.name, cause.tap, cause.proved) for cause in report.causes] == [
        ("untrained places counted in the loss", "loss.mean", True)
    ]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"
