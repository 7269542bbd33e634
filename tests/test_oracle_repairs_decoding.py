"""Faults planted in whole passes, cached or not: what an op was computed from, and what became of the cache."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from planted_steps import handing_on, is_step, masked, reading, rewired, rounded, through, with_values

from jaxgpt import model, taps
from jaxgpt import ops as true
from jaxgpt.cache import KVCache
from jaxgpt.taps import Op
from oracle import diagnosis, models, noise, probe
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.results import UNKNOWN, Report

pytestmark = pytest.mark.slow

SHORT = 24
FAMILIES = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 2, "n_positions": SHORT},
    "llama": models.MODELS["llama-square-biased-tied-linear"]
    | {"num_hidden_layers": 2, "max_position_embeddings": SHORT},
}
SEED = 97
Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    candidate: Candidate
    reference: Reference

    def bisect(self, rung: str, **changed: Any) -> Report:
        candidate = dataclasses.replace(self.candidate, **changed)
        comparison = Comparison(candidate, self.reference, None, None, noise.stored_calibration(), SEED)
        return diagnosis.bisect(comparison, rungs=(rung,))


@pytest.fixture(autouse=True, params=["eager", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the many changes that a repair tries is run a few times, so that compiling it is most of the time."""
    with jax.disable_jit(request.param == "eager"):
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            folder: Path = models.write(FAMILIES[family], tmp_path_factory.mktemp(family), "float32", SEED)
            made[family] = Case(models.candidate(folder, "float32"), Reference.load(folder, "float32"))
        return made[family]

    return case


@pytest.fixture(autouse=True)
def short_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forced steps and two greedy ones, of the same shapes, show every fault planted here."""
    whole = probe.decoding

    def decoding(*arguments: Any) -> probe.DecodeProbe:
        made = whole(*arguments)
        forced = dataclasses.replace(made.forced[0], ids=made.forced[0].ids[:3])
        return dataclasses.replace(made, forced=[forced], prompts=forced.prompts, new_tokens=[2] * len(forced.prompts))

    monkeypatch.setattr(probe, "decoding", decoding)


def names(found: Report) -> list[str]:
    return [cause.name for cause in found.causes]


# -- Wiring ----------------------------------------------------------------------------


def wired(*changes: Callable[[Op], Op]) -> Any:
    """A forward that goes through a changed table."""

    def forward(
        config: Any, params: Any, ids: Any, *, positions: Any, segments: Any, replace: Any = model.UNCHANGED
    ) -> Any:
        table = taps.ops(config)
        for change in changes:
            table = tuple(map(change, table))
        values = model.run(config, params, table, model.uncached_inputs(ids, positions, segments), replace=replace)
        return model.Output(values["logits"], {op.tap: values[op.tap] for op in taps.ops(config)})

    return forward


def given(**wrong: Any) -> Any:
    """A forward that is given other positions or segments; functions of the right ones."""

    def forward(config: Any, params: Any, ids: Any, **rest: Any) -> Any:
        return model.forward(config, params, ids, **rest | {name: change(rest[name]) for name, change in wrong.items()})

    return forward


def _step_reading(*change: str) -> Step:
    """A cached step with the same change of the table."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, *, replace: Any = model.UNCHANGED) -> Any:
        table = tuple(map(reading(*change), taps.ops(c, taps.Wiring(cached=True))))
        return through(table, c, p, model.cached_inputs(c, ids, counts, cache), counts, cache, replace)

    return step


def hidden_norm(config: Any, params: Any, ids: Any, *, replace: Any, **rest: Any) -> Any:
    def norm(c: Any, p: Any, x: Any) -> Any:
        return true.norm(dataclasses.replace(c, rms_norm_eps=1e-3), p, x)

    return model.forward(config, params, ids, replace={"norm": norm, **replace}, **rest)


STREAM = "layers.0.mlp_residual"
FORWARDS: dict[str, tuple[str, Any, str]] = {
    "norm bypassed": ("gpt2", wired(reading("layers.1.attn.v", "layers.1.attn_norm", STREAM)), "layers.1.attn.v"),
    "MLP in parallel with attention": (
        "gpt2",
        wired(
            reading("layers.0.mlp_norm", "layers.0.attn_residual", "embed.sum"),
            reading("layers.1.mlp_norm", "layers.1.attn_residual", STREAM),
        ),
        "layers.0.mlp_norm",
    ),
    "documents not separated": ("gpt2", given(segments=lambda x: None), "mask"),
    "attention's residual contributes nothing": (
        "gpt2",
        wired(reading("layers.1.mlp_residual", "layers.1.attn_residual", STREAM)),
        "layers.1.mlp_residual",
    ),
    "residual added to the normed stream": (
        "gpt2",
        wired(reading("layers.0.attn_residual", "embed.sum", "layers.0.attn_norm")),
        "layers.0.attn_residual",
    ),
    "layer skipped": (
        "gpt2",
        wired(
            reading("layers.1.attn_norm", STREAM, "embed.sum"), reading("layers.1.attn_residual", STREAM, "embed.sum")
        ),
        "layers.1.attn_norm",
    ),
    "final norm bypassed": ("gpt2", wired(reading("logits", "final_norm", "layers.1.mlp_residual")), "logits"),
    "q, k and v exchanged": (
        "gpt2",
        wired(reading("layers.1.attn.k_heads", "layers.1.attn.k", "layers.1.attn.q")),
        "layers.1.attn.k_heads",
    ),
    "an op uses another module's parameters": (
        "gpt2",
        wired(lambda op: dataclasses.replace(op, parameters="layers.0.mlp.up") if op.tap == "layers.1.mlp.up" else op),
        "layers.1.mlp.up",
    ),
    "position ids off by one": ("gpt2", given(positions=lambda x: jnp.maximum(x - 1, 0)), "embed.positions"),
    "position ids do not restart with a document": ("llama", given(positions=lambda x: None), "rope.angles"),
    "RoPE bypassed": (
        "llama",
        wired(reading("layers.1.attn.scores", "layers.1.attn.q_rope", "layers.1.attn.q_heads")),
        "layers.1.attn.scores",
    ),
    "an op reads the wrong tap": (
        "llama",
        wired(reading("layers.1.attn_residual", STREAM, "layers.1.attn.out")),
        "layers.1.attn_residual",
    ),
    "the forward pass runs another op than its own": ("gpt2", hidden_norm, "layers.0.attn_norm"),
}


def cases_of(table: dict[str, Any]) -> list[Any]:
    """Every twelfth is in `make test`."""
    marks = [[pytest.mark.exhaustive] if number % 12 else [] for number in range(len(table))]
    return [pytest.param(name, id=name.replace(" ", "_"), marks=mark) for name, mark in zip(table, marks, strict=True)]


@pytest.mark.parametrize("cause", cases_of(FORWARDS))
def test_what_an_op_was_computed_from_is_found_and_given_back(cases: Any, cause: str):
    family, forward, tap = FORWARDS[cause]
    found = cases(family).bisect("forward", forward_pass=forward)
    assert set(names(found)) == {cause}, [(each.tap, each.name, each.change) for each in found.causes]
    assert found.causes[0].tap == tap
    assert all(each.proved and not each.tied for each in found.causes)
    assert found.repaired is not None
    assert found.repaired.verdict == "pass"


def test_a_tap_that_nothing_gives_is_unknown_in_the_forward(cases: Any):
    def scaled(config: Any, params: Any, ids: Any, **rest: Any) -> Any:
        output = model.forward(config, params, ids, **rest)
        return output._replace(taps=output.taps | {"layers.0.mlp.down": 1.01 * output.taps["layers.0.mlp.down"]})

    found = cases("gpt2").bisect("forward", forward_pass=scaled)
    assert names(found) == [UNKNOWN]
    assert found.causes[0].tap == "layers.0.mlp.down"


# -- Cached steps ----------------------------------------------------------------------


def longer(cache: KVCache, by: Any) -> KVCache:
    return cache._replace(lengths=cache.lengths + by)


def one_further(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
    return model.forward_cached(c, p, ids, counts, longer(cache, int(is_step(ids))), **rest)


STEPS: dict[str, tuple[str, Step, tuple[str, str]]] = {
    "cache offset off by one": ("gpt2", one_further, ("embed.positions", "step 1")),
    "stale cache slot": (
        "gpt2",
        handing_on(lambda new, old, ids: new._replace(keys=old.keys) if is_step(ids) else new),
        ("layers.0.attn.keys", "step 2"),
    ),
    "cache dtype too low": ("llama", handing_on(rounded(jnp.bfloat16)), ("layers.0.attn.keys", "step 1")),
    "cache position not advanced": (
        "llama",
        handing_on(lambda new, old, ids: new._replace(lengths=old.lengths) if is_step(ids) else new),
        ("rope.angles", "step 2"),
    ),
    "padding counted as tokens": (
        "gpt2",
        handing_on(lambda new, old, ids: new._replace(lengths=old.lengths + ids.shape[1])),
        ("embed.positions", "step 1"),
    ),
    "position ids count the padding": (
        "llama",
        with_values(positions=lambda v, ids, counts: v["positions"] + (ids.shape[1] - counts)[:, None]),
        ("rope.angles", "prefill"),
    ),
    "position ids off by one": (
        "gpt2",
        with_values(positions=lambda v, ids, counts: jnp.maximum(v["positions"] - 1, 0)),
        ("embed.positions", "prefill"),
    ),
    "first row's positions used for every row": (
        "llama",
        with_values(positions=lambda v, ids, counts: jnp.broadcast_to(v["positions"][:1], v["positions"].shape)),
        ("rope.angles", "step 1"),
    ),
    "wrong positions in cached steps": (
        "llama",
        with_values(positions=lambda v, ids, counts: v["positions"] + (jnp.cumsum(counts) - counts)[:, None]),
        ("rope.angles", "prefill"),
    ),
    "wrong ids in cached steps": (
        "gpt2",
        with_values(ids=lambda v, ids, counts: (ids + 1) % 131 if is_step(ids) else ids),
        ("embed.tokens", "step 1"),
    ),
    "cache slot off by one": (
        "gpt2",
        with_values(slots=lambda v, ids, counts: v["slots"] + is_step(ids)),
        ("mask", "step 1"),
    ),
    "keys stored before RoPE": ("llama", rewired(("keys", "k_rope", "k_heads")), ("layers.0.attn.keys", "prefill")),
    "padding or unwritten slots visible": ("gpt2", masked(lambda slots, keys: slots > -1), ("mask", "prefill")),
    "earlier cache slots overwritten": (
        "gpt2",
        handing_on(
            lambda new, old, ids: (
                new._replace(keys=tuple(x.at[:, :, 0].set(0) for x in new.keys)) if is_step(ids) else new
            )
        ),
        ("layers.0.attn.keys", "step 2"),
    ),
    "cache handed on is not the one read": (
        "gpt2",
        handing_on(lambda new, old, ids: new._replace(keys=tuple(1.01 * x for x in new.keys))),
        ("layers.0.attn.keys", "step 1"),
    ),
}


@pytest.mark.parametrize("cause", cases_of(STEPS))
def test_a_wrong_step_is_named_and_proved_by_undoing_it(cases: Any, cause: str):
    family, step, place = STEPS[cause]
    found = cases(family).bisect("decode", step=step)
    assert names(found) == [cause], [(each.tap, each.name, each.change) for each in found.causes]
    (named,) = found.causes
    assert (named.tap, named.before.where) == place
    assert named.proved
    assert named.tied == []
    assert found.repaired is not None
    assert found.repaired.verdict == "pass"


@pytest.mark.exhaustive
def test_a_step_that_shakes_its_logits_is_unknown(cases: Any):
    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
        output, new = model.forward_cached(c, p, ids, counts, cache, **rest)
        return output._replace(taps=output.taps | {"logits": output.logits + jnp.sin(output.logits)}), new

    found = cases("gpt2").bisect("decode", step=step)
    assert names(found) == [UNKNOWN]
    assert found.causes[0].tap == "logits"


@pytest.mark.exhaustive
def test_a_mistake_that_forward_and_step_share_is_one_cause(cases: Any):
    case, (tap, wanted, read) = cases("gpt2"), ("layers.0.attn.v", "layers.0.attn_norm", "embed.sum")
    candidate = dataclasses.replace(
        case.candidate, forward_pass=wired(reading(tap, wanted, read)), step=_step_reading(tap, wanted, read)
    )
    comparison = Comparison(candidate, case.reference, None, None, noise.stored_calibration(), SEED)
    found = diagnosis.bisect(comparison, rungs=("forward", "decode"))
    assert names(found) == ["norm bypassed"]
    (named,) = found.causes
    assert (named.rung, named.tap, named.also_at) == ("forward", tap, [f"{tap} (rung decode)"])
    assert named.proved
    assert found.repaired is not None
    assert found.repaired.verdict == "pass"


def test_a_mistake_of_the_step_alone_is_another_than_the_forwards(cases: Any):
    case = cases("gpt2")
    candidate = dataclasses.replace(
        case.candidate,
        forward_pass=wired(reading("layers.0.attn.v", "layers.0.attn_norm", "embed.sum")),
        step=_step_reading("layers.1.attn.k", "layers.1.attn_norm", STREAM),
    )
    comparison = Comparison(candidate, case.reference, None, None, noise.stored_calibration(), SEED)
    found = diagnosis.bisect(comparison, rungs=("forward", "decode"))
    assert [(c.name, c.rung, c.tap) for c in found.causes] == [
        ("norm bypassed", "forward", "layers.0.attn.v"),
        ("norm bypassed", "decode", "layers.1.attn.k"),
    ]


def test_two_faults_of_a_step_are_both_named(cases: Any):
    narrow = rounded(jnp.float16)

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
        output, new = one_further(c, p, ids, counts, cache, **rest)
        return output, narrow(new, cache, ids)

    found = cases("gpt2").bisect("decode", step=step)
    assert names(found) == ["cache offset off by one", "cache dtype too low"]
