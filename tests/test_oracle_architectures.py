"""Norms of heads, sliding windows and yarn: true models pass, mistakes in them are found, located and named."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import ops as true
from jaxgpt import taps
from jaxgpt.config import ModelConfig
from jaxgpt.taps import Op, Wiring
from oracle import diagnosis, exposure, ladder, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.reference import Reference
from oracle.results import Report
from oracle.rungs import operators

pytestmark = pytest.mark.slow

SEED = 83
MODELS = {
    name: models.MODELS[name] | {"num_hidden_layers": 2, "max_position_embeddings": 40}
    for name in ("qwen3", "mistral-window", "qwen3-yarn-biased")
}
Function = Callable[..., Any]


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the many changes that a repair tries is run a few times, so that compiling it is most of the time."""
    with jax.disable_jit(request.param == "eager"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Comparison]:
    """A true comparison of a model of `MODELS`."""

    def make(name: str, dtype: str = "float32", **config: Any) -> Comparison:
        folder: Path = models.write(MODELS[name] | config, tmp_path_factory.mktemp(name), dtype, SEED)
        sides = models.candidate(folder, dtype), Reference.load(folder, dtype)
        return Comparison(*sides, folder, folder, noise.stored_calibration(), SEED)

    return make


def altered(comparison: Comparison, **changes: Any) -> Comparison:
    return dataclasses.replace(comparison, candidate=dataclasses.replace(comparison.candidate, **changes))


def bisected(comparison: Comparison, *rungs: str, **changes: Any) -> Report:
    return diagnosis.bisect(altered(comparison, **changes), rungs=rungs or ("operators",))


# -- True models -----------------------------------------------------------------------


@pytest.mark.exhaustive  # `make equivalence` has them all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_true_model_passes_every_rung(made: Callable[..., Comparison], name: str, dtype: str):
    report = ladder.climb(made(name, dtype, num_hidden_layers=1))  # layers are alike, and compiling them takes long
    assert report.verdict == "pass", report.broken
    assert [rung.verdict for rung in report.rungs] == ["pass"] * (len(ladder.LADDER) - 1)


def test_the_taps_of_both_sides_pair_up_norms_of_heads_between_heads_and_rotation(made: Callable[..., Comparison]):
    comparison = made("qwen3")
    rung, _ = ladder.climb(comparison, rungs=("operators", "forward")).rungs
    compared = list(dict.fromkeys(finding.tap for finding in rung.findings))
    assert compared == list(taps.names(comparison.candidate.config, Wiring(cached=True)))
    at = compared.index("layers.1.attn.q_norm")
    assert compared[at - 1 : at + 3] == [f"layers.1.attn.{tap}" for tap in ("v_heads", "q_norm", "k_norm", "q_rope")]
    assert {finding.where for finding in rung.findings if finding.tap == "layers.0.attn.k_norm"} == {"", "small rows"}


def test_a_calibration_without_an_op_is_inconclusive_and_names_it(made: Callable[..., Comparison]):
    stored = noise.stored_calibration()
    local = {dtype: {op: pair for op, pair in of.items() if op != "norm"} for dtype, of in _local(stored).items()}
    without = Calibration(stored.factor, {**stored.maxima, "operators": local}, stored.environment)
    report = ladder.climb(dataclasses.replace(made("qwen3"), calibration=without), rungs=("operators",))
    assert report.verdict == "inconclusive"
    assert any("no clean runs of norm in float32" in rung.summary for rung in report.rungs)


def _local(calibration: Calibration) -> Any:
    return calibration.maxima["operators"]


# -- Mistakes --------------------------------------------------------------------------


def over_all_heads(c: ModelConfig, p: Any, x: Any) -> Any:
    spread = jnp.square(x.astype(jnp.float32)).mean((1, -1), keepdims=True)
    return (x / jnp.sqrt(spread + c.rms_norm_eps) * p["weight"]).astype(x.dtype)


def changed(function: Function, **fields: Any) -> Function:
    return lambda c, p, *x: function(dataclasses.replace(c, **fields), p, *x)


def sees_next(c: ModelConfig, p: Any, slots: Any, keys: Any, segments: Any, key_segments: Any) -> Any:
    following = keys[None, None, None] == slots[:, None, :, None] + 1
    same = segments[:, None, :, None] == key_segments[:, None, None]
    return true.attention_mask(c, p, slots, keys, segments, key_segments) | (following & same)


def unstretched(c: ModelConfig, p: Any, x: Any, angles: Any) -> Any:
    return true.rope(dataclasses.replace(c, rope_scaling=None), p, x, angles)


Q_NORM, K_NORM, Q_ROPE = (f"layers.1.attn.{tap}" for tap in ("q_norm", "k_norm", "q_rope"))
WINDOW, YARN = "mistral-window", "qwen3-yarn-biased"
MISTAKES: dict[str, tuple[str, str, str, Function, str]] = {
    "q_norm skipped": ("qwen3", Q_NORM, Q_NORM, lambda c, p, x: x, "norm left out"),
    "k_norm without its weight": (
        "qwen3",
        K_NORM,
        K_NORM,
        lambda c, p, x: true.norm(c, {"weight": jnp.ones_like(p["weight"])}, x),
        "norm weight missing",
    ),
    "heads normalised together": (
        "qwen3",
        Q_NORM,
        Q_NORM,
        over_all_heads,
        "heads normalised together instead of each by itself",
    ),
    "window one too wide": (
        WINDOW,
        "attention_mask",
        "mask",
        changed(true.attention_mask, sliding_window=14),
        "sliding window of another width",
    ),
    "window one too narrow": (
        WINDOW,
        "attention_mask",
        "mask",
        changed(true.attention_mask, sliding_window=12),
        "sliding window of another width",
    ),
    "window ignored": (
        WINDOW,
        "attention_mask",
        "mask",
        changed(true.attention_mask, sliding_window=None),
        "sliding window ignored",
    ),
    "the next token seen through a window": (
        WINDOW,
        "attention_mask",
        "mask",
        sees_next,
        "causal mask off by one",
    ),
    "yarn factor ignored": (
        YARN,
        "angles",
        "rope.angles",
        changed(true.angles, rope_scaling=None),
        "rope scaling",
    ),
    "yarn's attention factor ignored": (YARN, Q_ROPE, Q_ROPE, unstretched, "yarn's attention factor missing"),
}
QUICK = ("q_norm skipped", "window one too wide", "yarn factor ignored")
NARROW = ("heads normalised together", "window ignored", "yarn's attention factor ignored")
"""Of each model one that `make test` has in bfloat16, and one in float32."""


def cases() -> list[Any]:
    quick = [pytest.param(name, "float32") for name in QUICK]
    narrow = [pytest.param(name, "bfloat16") for name in NARROW]
    every = [(name, dtype) for name in MISTAKES for dtype in ("float32", "bfloat16")]
    chosen = [param.values for param in quick + narrow]
    return quick + narrow + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in every if case not in chosen]


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize(("mistake", "dtype"), cases())
def test_a_mistake_is_found_where_it_is_named_and_proved(made: Callable[..., Comparison], mistake: str, dtype: str):
    model, replaced, tap, function, name = MISTAKES[mistake]
    report = bisected(made(model, dtype), replace={replaced: function})
    assert report.broken is not None
    assert report.broken.first is not None
    assert report.broken.first.tap == tap
    (cause,) = report.causes
    assert cause.name.startswith(name)
    assert cause.proved
    assert not cause.tied


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        pytest.param(WINDOW, {"sliding_window": 14}, marks=pytest.mark.exhaustive),
        (WINDOW, {"sliding_window": None}),
        (YARN, {"rope_scaling": None}),
    ],
)
def test_a_config_read_wrongly_is_named_by_its_field(made: Callable[..., Comparison], model: str, fields: Any):
    comparison = made(model)
    config = dataclasses.replace(comparison.candidate.config, **fields)
    (cause,) = bisected(comparison, config=config).causes
    assert cause.name == f"config field {next(iter(fields))} differs from the folder's"
    assert cause.proved


def test_a_window_that_no_sequence_reaches_is_compared_at_its_end(made: Callable[..., Comparison]):
    comparison = made(WINDOW, sliding_window=4096, max_position_embeddings=8192)
    probe = dataclasses.replace(comparison, candidate=comparison.candidate)
    wrong = {"attention_mask": changed(true.attention_mask, sliding_window=4097)}
    model, judge = comparison.reference, comparison.judge("operators")
    for replace, ok in (({}, True), (wrong, False)):
        candidate = altered(probe, replace=replace).candidate
        walk = operators.Walk(candidate, model, comparison.sequences(), judge)
        (mask,) = [op for op in walk.ops if op.tap == "mask"]
        (at_end,) = walk.compare(mask, walk.inputs(mask, operators.EDGE) or [], operators.EDGE)[0]
        assert at_end.ok is ok
        (as_read,) = walk.compare(mask, walk.inputs(mask, "") or [])[0]
        assert as_read.ok, "528 tokens do not tell 4,096 from 4,097"


# -- Wiring and cached steps -----------------------------------------------------------


def test_a_rotation_of_heads_before_their_norm_is_named(
    made: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
):
    own = taps.attention_ops

    def wrong(config: ModelConfig, layer: int, wiring: Wiring, stream: str) -> Iterator[Op]:
        for op in own(config, layer, wiring, stream):
            skips = op.tap == f"layers.{layer}.attn.q_rope"
            yield dataclasses.replace(op, inputs=(f"layers.{layer}.attn.q_heads", "rope.angles")) if skips else op

    comparison = made("qwen3", intermediate_size=61)  # compiled with its table, so a model of no other test
    monkeypatch.setattr(taps, "attention_ops", wrong)
    report = bisected(comparison, "operators", "forward")
    (cause,) = report.causes
    assert (cause.name, cause.tap, cause.proved) == ("QK-norm bypassed", "layers.0.attn.q_rope", True)


def forgetful(candidate: Candidate) -> Candidate:
    """Cached steps see all that is in the cache, whatever the window."""
    inner = candidate.step

    def step(config: ModelConfig, *given: Any, **further: Any) -> Any:
        return inner(dataclasses.replace(config, sliding_window=None), *given, **further)

    return dataclasses.replace(candidate, step=step)


@pytest.mark.exhaustive
def test_cached_steps_without_the_window_are_named(made: Callable[..., Comparison]):
    comparison = made(WINDOW, num_hidden_layers=1)
    wrong = dataclasses.replace(comparison, candidate=forgetful(comparison.candidate))
    report = diagnosis.bisect(wrong, rungs=("operators", "forward", "decode"))
    (cause,) = report.causes
    assert (cause.name, cause.rung, cause.tap, cause.proved) == ("sliding window ignored", "decode", "mask", True)


# -- What could have shown -------------------------------------------------------------


def test_what_could_have_shown_follows_from_the_model(made: Callable[..., Comparison]):
    of = {name: exposure.classes(made(name), list(ladder.LADDER)) for name in MODELS}
    exposed = {name: set(found) for name, (found, _) in of.items()}
    assert "q_norm skipped" in exposed["qwen3"] & exposed[YARN]
    assert of[WINDOW][1]["q_norm skipped"] == "exists only where the heads of queries and keys are normalised"
    assert {"sliding window off by one", "sliding window ignored"} <= exposed[WINDOW]
    assert of["qwen3"][1]["sliding window off by one"] == "exists only where attention has a sliding window"
    assert {"yarn factor ignored", "yarn attention factor ignored"} <= exposed[YARN]
    assert of["qwen3"][1]["yarn factor ignored"] == "exists only where RoPE is scaled, by the rule yarn"


def test_a_window_longer_than_what_is_read_is_said(made: Callable[..., Comparison]):
    key = "tokens before the sliding window"
    assert key not in exposure.beyond(made(WINDOW), ("operators",))
    assert key in exposure.beyond(made(WINDOW, sliding_window=40), ("operators",))
