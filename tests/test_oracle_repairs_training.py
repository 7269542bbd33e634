"""Mistakes of training and the repairs that undo them: each must get its own name, wherever it is made."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_oracle_training import Case, load, packing

from jaxgpt import model
from jaxgpt.train_step import StepReport
from oracle import diagnosis, training, training_probe, training_site
from oracle.candidate import Candidate
from oracle.rungs import gradients, loss, optimizer
from oracle.training_site import trained

pytestmark = pytest.mark.slow

Plant = Callable[[Candidate], Candidate]
MODELS = [("gpt2", "float32")]
HEAVY = [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("llama", "float32")]


def quick(names: Any, *chosen: str) -> list[Any]:
    """All of them, those that are not chosen marked exhaustive."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.exhaustive) for name in names]


@pytest.fixture(
    scope="module",
    params=[*MODELS, *(pytest.param(pair, marks=pytest.mark.exhaustive) for pair in HEAVY)],
    ids=lambda pair: "-".join(pair),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, dtype = request.param
    return load(family, dtype, tmp_path_factory.mktemp(family))


def first_cause(case: Case, plant: Plant, rung: str) -> tuple[str, bool, list[str]]:
    """Name, whether the place agrees with the repair, ties; the rungs before have passed by construction."""
    report = diagnosis.bisect(case.comparison(plant(case.candidate)), rungs=(rung,))
    cause = report.causes[0]
    return cause.name, cause.proved, list(cause.tied)


# -- Batches ---------------------------------------------------------------------------


def ends_unflagged(candidate: Candidate) -> Candidate:
    """The episodes' flags are wrong before packing: targets are lost with them."""

    def without(flags: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(flag * following for flag, following in zip(flags, (*flags[1:], 0), strict=True))

    def packer(corpus: training_probe.Corpus, settings: Any) -> list[Any]:
        episodes = tuple((ids, without(flags)) for ids, flags in corpus.episodes)
        return training.batches(training_probe.Corpus(corpus.documents, episodes), settings)

    return trained(candidate, batches=packer)


def ends_unmasked(candidate: Candidate) -> Candidate:
    """The mask alone is wrong."""

    def packer(corpus: training_probe.Corpus, settings: Any) -> list[Any]:
        true: list[Any] = training.batches(corpus, settings)
        other: Any = ends_unflagged(candidate).training.batches(corpus, settings)
        return [batch | {"mask": wrong["mask"]} for batch, wrong in zip(true, other, strict=True)]

    return trained(candidate, batches=packer)


def run_on(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    places = np.broadcast_to(np.arange(batch["ids"].shape[1], dtype=np.int32), batch["ids"].shape)
    return {"positions": np.where(batch["segments"] > 0, places, 0)}


BATCHES: dict[str, tuple[Plant, str]] = {
    "ends unflagged": (ends_unflagged, "end-of-reply token not trained"),
    "ends unmasked": (ends_unmasked, "end-of-reply token not trained"),
    "one segment": (packing(lambda b: {"segments": np.minimum(b["segments"], 1)}), "segments lost"),
    "one segment, padding too": (packing(lambda b: {"segments": np.ones_like(b["segments"])}), "segments lost"),
    "positions run on": (packing(run_on), "positions run on across documents"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_a_packer_lost_is_named(case: Case, name: str):
    plant, expected = BATCHES[name]
    assert first_cause(case, plant, loss.NAME) == (expected, True, [])


def test_positions_from_one_are_not_taken_for_positions_that_run_on(case: Case):
    plant = packing(lambda b: {"positions": b["positions"] + 1})
    assert first_cause(case, plant, loss.NAME)[0] == "unknown"


# -- Losses ----------------------------------------------------------------------------

Function = Callable[[jax.Array, Any], jax.Array]


def nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def logits_of(config: Any, params: Any, batch: Any, dtype: str) -> jax.Array:
    given = {name: batch[name] for name in ("positions", "segments")}
    return model.forward(config, model.cast(params, dtype), batch["ids"], **given).logits


def losing(function: Function) -> Plant:
    """Another loss of every token, alone or with the gradients made of it too."""

    def losses(config: Any, params: Any, batch: Any, dtype: str) -> Any:
        config = training_probe.without_dropout(config)
        return function(logits_of(config, params, batch, dtype), batch)

    return lambda candidate: trained(candidate, losses=jax.jit(losses, static_argnums=(0, 3)))


Parts = Callable[[Any, Any, Any], Any]
"""Losses (A, B, T), masks (A, B, T), log Z: what is minimised."""


def mean_of(function: Function, mean: Parts) -> Plant:
    """Gradients of another mean."""

    def found(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        def value(params: Any) -> Any:
            rows = [{n: a[i] for n, a in batches.items()} for i in range(batches["ids"].shape[0])]
            logits = [logits_of(config, params, batch, dtype).astype(jnp.float32) for batch in rows]
            losses = jnp.stack([function(own, batch) for own, batch in zip(logits, rows, strict=True)])
            return mean(losses, batches, jnp.stack([jax.nn.logsumexp(own, -1) for own in logits]))

        return jax.value_and_grad(value)(state.params)

    return lambda candidate: trained(candidate, gradients=jax.jit(found, static_argnums=(0, 1, 2)))


def true_mean(losses: Any, batches: Any, _: Any) -> Any:
    return (losses * batches["mask"]).sum() / batches["mask"].sum()


def true(logits: jax.Array, batch: Any) -> jax.Array:
    return nll(logits, batch["targets"])


def smoothed(share: float) -> Function:
    def function(logits: jax.Array, batch: Any) -> jax.Array:
        uniform = -jax.nn.log_softmax(logits.astype(jnp.float32)).mean(-1)
        return (1 - share) * nll(logits, batch["targets"]) + share * uniform

    return function


def with_z(share: float) -> Function:
    def function(logits: jax.Array, batch: Any) -> jax.Array:
        return nll(logits, batch["targets"]) + share * jax.nn.logsumexp(logits.astype(jnp.float32), -1) ** 2

    return function


def narrow(dtype: Any) -> Function:
    def function(logits: jax.Array, batch: Any) -> jax.Array:
        found = jax.nn.log_softmax(logits.astype(dtype))
        return -jnp.take_along_axis(found, batch["targets"][..., None], -1)[..., 0].astype(jnp.float32)

    return function


def short(logits: jax.Array, batch: Any) -> jax.Array:
    return nll(logits[:, :-1], batch["targets"][:, 1:])


LOSSES: dict[str, tuple[Function, str]] = {
    "bits": (lambda logits, batch: true(logits, batch) / math.log(2), "loss in bits"),
    "smoothing": (smoothed(0.1), "label smoothing"),
    "less smoothing": (smoothed(0.03), "label smoothing"),
    "z-loss": (with_z(1e-3), "z-loss added"),
    "small z-loss": (with_z(1e-4), "z-loss added"),
    "shifted, shorter": (short, "label shift doubled"),
    "shifted, filled": (lambda logits, batch: jnp.pad(short(logits, batch), ((0, 0), (0, 1))), "label shift doubled"),
    "shifted, turned": (lambda logits, batch: nll(logits, jnp.roll(batch["targets"], -1, 1)), "label shift doubled"),
    "not shifted": (lambda logits, batch: nll(logits, batch["ids"]), "label shift missing"),
    "bfloat16": (narrow(jnp.bfloat16), "loss computed in low precision"),
    "float16": (narrow(jnp.float16), "loss computed in low precision"),
    "logits in bfloat16": (
        # XLA may leave out a cast there and back.
        lambda logits, batch: nll(jax.lax.reduce_precision(logits, 8, 7), batch["targets"]),
        "loss computed in low precision",
    ),
}
SMALL = ("bfloat16", "float16", "logits in bfloat16", "smoothing", "less smoothing", "z-loss", "small z-loss")
BELOW_NOISE = {("bfloat16", name) for name in (*SMALL, "mean of means")}
"""What the rounding of a bfloat16 model hides."""
MEANS: dict[str, tuple[Parts, str]] = {
    "mean of means": (
        lambda losses, b, _: ((losses * b["mask"]).sum((1, 2)) / b["mask"].sum((1, 2))).mean(),
        "gradient accumulation normalised per micro-batch",
    ),
    "sum of means": (
        lambda losses, b, _: ((losses * b["mask"]).sum((1, 2)) / b["mask"].sum((1, 2))).sum(),
        "micro-batches summed without dividing",
    ),
    "sum": (lambda losses, b, _: (losses * b["mask"]).sum(), "micro-batches summed without dividing"),
    "all places": (lambda losses, *_: losses.mean(), "mean over all places instead of the trained"),
    "masked, all places": (
        lambda losses, b, _: (losses * b["mask"]).mean(),
        "mean over all places instead of the trained",
    ),
    "z-loss": (
        lambda losses, b, z: true_mean(losses, b, z) + 1e-3 * true_mean(z**2, b, z),
        "z-loss added",
    ),
    "last only": (
        lambda losses, b, _: (losses * b["mask"])[-1].sum() / b["mask"].sum(),
        "only one micro-batch's gradient kept",
    ),
}


@pytest.mark.parametrize("name", quick(LOSSES, "smoothing", "z-loss", "shifted, shorter"))
def test_a_wrong_loss_of_tokens_is_named(case: Case, name: str):
    function, expected = LOSSES[name]
    if (case.candidate.dtype, name) in BELOW_NOISE:
        pytest.skip("below the noise of the dtype")
    assert first_cause(case, losing(function), loss.NAME) == (expected, True, [])


@pytest.mark.parametrize("name", quick(MEANS, "sum"))
def test_a_wrong_mean_is_named(case: Case, name: str):
    mean, expected = MEANS[name]
    if (case.candidate.dtype, name) in BELOW_NOISE:
        pytest.skip("below the noise of the dtype")
    assert first_cause(case, mean_of(true, mean), loss.NAME) == (expected, True, [])


# -- Gradients -------------------------------------------------------------------------


def regraded(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    def found(*given: Any) -> Any:
        value, right = training.gradients(*given)
        return value, change(dict(right))

    return lambda candidate: trained(candidate, gradients=found)


def overwritten(own: bool) -> Plant:
    def found(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        value, _ = training.gradients(config, settings, dtype, state, batches)
        last = {name: array[-1:] for name, array in batches.items()}
        _, gradients = training.gradients(config, settings, dtype, state, last)
        share = 1.0 if own else float(last["mask"].sum() / batches["mask"].sum())
        return value, {name: share * array for name, array in gradients.items()}

    return lambda candidate: trained(candidate, gradients=found)


def narrow_sums(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
    value, _ = training.gradients(config, settings, dtype, state, batches)
    total: dict[str, Any] = {}
    for i in range(batches["ids"].shape[0]):
        one = {name: array[i : i + 1] for name, array in batches.items()}
        _, part = training.gradients(config, settings, dtype, state, one)
        share = one["mask"].sum() / batches["mask"].sum()
        total = {n: total.get(n, jnp.bfloat16(0)) + (share * g).astype(jnp.bfloat16) for n, g in part.items()}
    return value, {name: array.astype(jnp.float32) for name, array in total.items()}


def frozen(*endings: str) -> Plant:
    return regraded(lambda g: {n: 0 * a if n.endswith(endings) else a for n, a in g.items()})


GRADIENTS: dict[str, tuple[Plant, str]] = {
    "overwritten": (overwritten(False), "only one micro-batch's gradient kept"),
    "overwritten, own count": (overwritten(True), "only one micro-batch's gradient kept"),
    "scaled": (regraded(lambda g: {n: 0.7 * a for n, a in g.items()}), "gradients scaled by a constant"),
    "embedding frozen": (frozen("embed.tokens.weight"), "parameter not trained"),
    "norms frozen": (frozen("norm.weight"), "parameter not trained"),
    "biases frozen": (frozen("bias"), "parameter not trained"),
    "bias lost": (
        regraded(lambda g: {n: a for n, a in g.items() if n != "layers.0.mlp.up.bias"}),
        "parameter not trained",
    ),
    "bfloat16 sums": (lambda c: trained(c, gradients=narrow_sums), "gradients accumulated in low precision"),
}


@pytest.mark.parametrize("name", quick(GRADIENTS, "scaled", "norms frozen"))
def test_a_wrong_gradient_is_named(case: Case, name: str):
    plant, expected = GRADIENTS[name]
    if (case.candidate.dtype, name) == ("bfloat16", "bfloat16 sums"):
        pytest.skip("below the noise of the dtype")
    assert first_cause(case, plant, gradients.NAME) == (expected, True, [])


# -- Steps -----------------------------------------------------------------------------


def cosine(settings: Any, count: int, *, final: float = 0.1, warmup: int = 4) -> float:
    if count < warmup:
        return settings.learning_rate * (count + 1) / (warmup + 1)
    past = min(1.0, (count - warmup) / (settings.steps - 1 - warmup))
    return settings.learning_rate * (final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * past)))


def line(settings: Any, count: int) -> float:
    if count < 4:
        return cosine(settings, count)
    return settings.learning_rate * (1 - 0.9 * (count - 4) / 15)


def adam(m: Any, v: Any, t: int, b1: float = 0.9, b2: float = 0.95) -> Any:
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def stepping(
    *,
    rate: Callable[[Any, int], float] = cosine,
    betas: tuple[float, float] = (0.9, 0.95),
    direction: Callable[[Any, Any, int], Any] = adam,
    clip: Callable[[Any, float, float], Any] = lambda g, norm, limit: g * min(1.0, limit / norm),
    decay: Callable[[str, Any, float], Any] = lambda n, p, rate: 0.5 * rate * p * (p.ndim > 1),
    l2: float = 0.0,
    keep: bool = True,
    store: Callable[[Any], Any] = lambda p: p,
    tells: bool = True,
    sums: Callable[..., Any] = training.gradients,
) -> Plant:
    """A step of its own with numpy's AdamW, wrong in one thing."""

    def step(config: Any, settings: Any, dtype: str, state: Any, batches: Any) -> Any:
        common = training_probe.settings_for(config, training_probe.SETTINGS)
        value, found = sums(config, common, dtype, state._replace(moments=(), step=jnp.int32(0)), batches)
        count = int(state.step)
        p = {n: np.asarray(a, np.float64) for n, a in state.params.items()}
        g = {n: np.asarray(a, np.float64) + l2 * p[n] * (p[n].ndim > 1) for n, a in found.items()}
        norm = math.sqrt(sum((a**2).sum() for a in g.values()))
        g = {n: clip(a, norm, settings.clip_norm) for n, a in g.items()}
        old = state.moments if count and keep else dict.fromkeys(g, (0.0, 0.0))
        b1, b2 = betas
        moments = {n: (b1 * old[n][0] + (1 - b1) * a, b2 * old[n][1] + (1 - b2) * a**2) for n, a in g.items()}
        now = rate(settings, count)
        t = count + 1 if keep else 1
        new = {n: a - now * direction(*moments[n], t) - decay(n, a, now) for n, a in p.items()}
        told = now if tells else cosine(settings, count)
        report = StepReport(value, jnp.float32(norm), jnp.float32(told), jnp.bool(True))
        stored = {n: jnp.asarray(store(jnp.asarray(a, jnp.float32)), jnp.float32) for n, a in new.items()}
        return state._replace(params=stored, moments=moments, step=state.step + 1), report

    return lambda candidate: trained(candidate, step=step)


@pytest.mark.parametrize("in_step", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.exhaustive
def test_sums_in_bfloat16_are_one_cause_whether_the_step_has_them_or_not(
    case: Case, in_step: bool, monkeypatch: pytest.MonkeyPatch
):
    # In a larger model the norm that a step tells is hardly touched.
    monkeypatch.setattr(training_site, "WRONG", 0.1)
    if case.candidate.dtype == "bfloat16":
        pytest.skip("below the noise of the dtype")
    step = stepping(sums=narrow_sums)(case.candidate).training.step if in_step else case.candidate.training.step
    altered = trained(case.candidate, gradients=narrow_sums, step=step)
    report = diagnosis.bisect(case.comparison(altered), rungs=(gradients.NAME, optimizer.NAME))
    assert [(c.name, c.proved) for c in report.causes] == [("gradients accumulated in low precision", True)]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


def alone(g: Any, _: float, limit: float) -> Any:
    return g * min(1.0, limit / (float(np.linalg.norm(g)) or 1.0))


STEPS: dict[str, tuple[Plant, str]] = {
    "to zero": (stepping(rate=lambda s, k: cosine(s, k, final=0.0)), "learning rate decays to zero"),
    "to zero, untold": (
        stepping(rate=lambda s, k: cosine(s, k, final=0.0), tells=False),
        "learning rate decays to zero",
    ),
    "line": (stepping(rate=line), "linear instead of cosine decay"),
    "constant": (stepping(rate=lambda s, k: cosine(s, min(k, 4))), "constant learning rate"),
    "cold": (stepping(rate=lambda s, k: cosine(s, max(k, 4))), "warm-up missing"),
    "cold, longer decay": (stepping(rate=lambda s, k: cosine(s, k, warmup=0)), "warm-up missing"),
    "micro": (stepping(rate=lambda s, k: cosine(s, min(19, 3 * k))), "schedule counted in micro-batches"),
    "early": (stepping(rate=lambda s, k: cosine(s, k + 1)), "learning-rate schedule off by one"),
    "late": (stepping(rate=lambda s, k: cosine(s, k - 1) if k else 0.0), "learning-rate schedule off by one"),
    "early, untold": (stepping(rate=lambda s, k: cosine(s, k + 1), tells=False), "learning-rate schedule off by one"),
    "exchanged": (
        stepping(betas=(0.95, 0.9), direction=lambda m, v, t: adam(m, v, t, 0.95, 0.9)),
        "betas exchanged",
    ),
    "beta2": (
        stepping(betas=(0.9, 0.999), direction=lambda m, v, t: adam(m, v, t, 0.9, 0.999)),
        "wrong betas of AdamW",
    ),
    "epsilon": (
        stepping(direction=lambda m, v, t: m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-5)),
        "wrong epsilon of Adam",
    ),
    "inside": (
        stepping(direction=lambda m, v, t: m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.95**t) + 1e-8)),
        "epsilon inside the root",
    ),
    "biased": (stepping(direction=lambda m, v, _: m / (np.sqrt(v) + 1e-8)), "bias correction missing"),
    "rootless": (
        stepping(direction=lambda m, v, t: m / (1 - 0.9**t) / (v / (1 - 0.95**t) + 1e-8)),
        "second moment without its root",
    ),
    "reset": (stepping(keep=False), "moments reset at each step"),
    "unclipped": (stepping(clip=lambda g, *_: g), "gradients not clipped by their global norm"),
    "clipped alone": (stepping(clip=alone), "gradients not clipped by their global norm"),
    "by value": (stepping(clip=lambda g, _, limit: np.clip(g, -0.01, 0.01)), "gradients clipped by value"),
    "no decay": (stepping(decay=lambda *_: 0.0), "weight decay missing"),
    "L2": (stepping(decay=lambda *_: 0.0, l2=0.5), "coupled (L2) weight decay"),
    "all decay": (stepping(decay=lambda n, p, rate: 0.5 * rate * p), "decay applied to norms and biases"),
    "unscheduled": (
        stepping(decay=lambda n, p, rate: 0.5 * 5e-4 * p * (p.ndim > 1)),
        "decay not multiplied by the schedule",
    ),
    "no rate in decay": (
        stepping(decay=lambda n, p, rate: 0.5 * p * (p.ndim > 1)),
        "decay not multiplied by the schedule",
    ),
    "less decay": (stepping(decay=lambda n, p, rate: 0.1 * rate * p * (p.ndim > 1)), "wrong weight decay"),
    "narrow": (stepping(store=lambda p: p.astype(jnp.bfloat16)), "master weights in low precision"),
}


@pytest.mark.parametrize("name", quick(STEPS, "beta2"))
def test_a_wrong_update_is_named(case: Case, name: str):
    plant, expected = STEPS[name]
    assert first_cause(case, plant, optimizer.NAME) == (expected, True, [])


def test_the_step_of_these_tests_is_right_where_nothing_is_planted(case: Case):
    report = diagnosis.bisect(case.comparison(stepping()(case.candidate)), rungs=(optimizer.NAME,))
    assert report.verdict == "pass", report.first_divergence()
