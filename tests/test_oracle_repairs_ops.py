"""Faults planted in single ops must be named and proved by undoing them; what nobody foresaw stays unknown."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import ops as true
from jaxgpt.config import RopeScaling
from oracle import diagnosis, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.results import UNKNOWN, Report

pytestmark = pytest.mark.slow

SHORT = 24
"""Positions: the faults need no more."""
FAMILIES = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 2, "n_positions": SHORT},
    "llama": models.MODELS["llama-square-biased-tied-linear"]
    | {"num_hidden_layers": 2, "max_position_embeddings": SHORT},
    "llama3": models.MODELS["llama3-scaling"] | {"num_hidden_layers": 2, "max_position_embeddings": SHORT},
    "plain": models.MODELS["llama"] | {"num_hidden_layers": 2, "max_position_embeddings": SHORT},
}
SEED = 97
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    candidate: Candidate
    reference: Reference
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Of the true ops, which are most of every case."""

    def bisect(self, replace: dict[str, Function], **changed: Any) -> Report:
        candidate = dataclasses.replace(self.candidate, replace=replace, **changed)
        given = noise.stored_calibration(), SEED
        comparison = Comparison(candidate, self.reference, None, None, *given, measured=self.measured)
        return diagnosis.bisect(comparison, rungs=("operators",))


@pytest.fixture(autouse=True, params=["eager", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the many changes that a repair tries is run once or twice, so that compiling it is most of the time."""
    with jax.disable_jit(request.param == "eager"):
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    made: dict[tuple[str, str, bool], Case] = {}

    def case(family: str, dtype: str = "float32") -> Case:
        key = family, dtype, bool(jax.config.jax_disable_jit)
        if key not in made:
            folder: Path = models.write(FAMILIES[family], tmp_path_factory.mktemp(family), dtype, SEED)
            made[key] = Case(models.candidate(folder, dtype), Reference.load(folder, dtype))
        return made[key]

    return case


def names(found: Report) -> list[str]:
    return [cause.name for cause in found.causes]


# -- Faults ----------------------------------------------------------------------------


def wide(x: Any) -> Any:
    return x.astype(jnp.float32)


def with_config(function: Function, **fields: Any) -> Function:
    return lambda c, p, *x: function(dataclasses.replace(c, **fields), p, *x)


def narrow(function: Function, dtype: Any) -> Function:
    """The op on narrow inputs and parameters, its answer in the dtype it ought to have."""

    def op(c: Any, p: Any, *x: Any) -> Any:
        def cast(a: Any) -> Any:
            return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

        answer = function(c, p, *x).dtype
        return function(c, {name: cast(a) for name, a in p.items()}, *map(cast, x)).astype(answer)

    return op


def norm(
    eps: float = 1e-5, *, outside: bool = False, plus: int = 0, bias: int = 1, freedom: int = 0, centred: bool = True
) -> Function:
    def op(c: Any, p: Any, x: Any) -> Any:
        y = wide(x)
        less = y - y.mean(-1, keepdims=True) if c.norm == "layernorm" else y
        square = jnp.square(less).sum(-1, keepdims=True) / (x.shape[-1] - freedom)
        root = jnp.sqrt(square) + eps if outside else jnp.sqrt(square + eps)
        y = (less if centred else y) / root * (plus + wide(p["weight"]))
        return (y + bias * wide(p["bias"]) if "bias" in p else y).astype(x.dtype)

    return op


def narrow_norm(c: Any, p: Any, x: Any) -> Any:
    y = x.astype(jnp.bfloat16)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.rms_norm_eps)
    return (y * p["weight"].astype(jnp.bfloat16) + p["bias"].astype(jnp.bfloat16)).astype(x.dtype)


def interleaved(c: Any, p: Any, x: Any, angles: Any) -> Any:
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def counted(x: Any) -> Any:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)


def triangle(x: Any, diagonal: int) -> Any:
    return jnp.tril(jnp.ones(x.shape[-2:], bool), diagonal)


def tiled(function: Function) -> Function:
    return lambda c, p, x, kv: function(c, p, x, jnp.tile(kv, (1, x.shape[1] // kv.shape[1], 1, 1)))


def regrouped(function: Function) -> Function:
    """Query head k·G + g is computed from head g·K + k, G of K kv heads each."""

    def wrong(c: Any, p: Any, x: Any, kv: Any) -> Any:
        order = jnp.arange(x.shape[1]).reshape(-1, kv.shape[1]).T.ravel()
        return function(c, p, x[:, order], kv)

    return wrong


def activation(function: Function) -> Function:
    return lambda c, p, x, *up: (function(wide(x)) * (up[0] if up else 1)).astype(x.dtype)


def summed(a: float, b: float) -> Function:
    return lambda c, p, x, y: a * x + b * y


def windowed(c: Any, p: Any, slots: Any, keys: Any, *segments: Any) -> Any:
    return true.attention_mask(c, p, slots, keys, *segments) & (slots[:, None, :, None] - keys < 5)


Fault = tuple[str, str, Function, str]
"""Family, where it is planted, the wrong op, the cause that must be named."""
Q, K, NORM, MASKED = "layers.0.attn.q_rope", "layers.0.attn.k_rope", "layers.1.mlp_norm", "layers.1.attn.masked"
FIRST: tuple[Fault, ...] = (
    ("gpt2", NORM, norm(1e-3), "norm eps wrong"),
    ("gpt2", NORM, narrow_norm, "computed in bfloat16"),
    ("gpt2", "mask", lambda c, p, s, k, *g: true.attention_mask(c, p, s + 1, k, *g), "causal mask off by one"),
    ("gpt2", MASKED, lambda c, p, s, m: jnp.where(m, s, -1e4), "mask value too small"),
    (
        "gpt2",
        "layers.1.mlp.act",
        activation(lambda x: jax.nn.gelu(x, approximate=False)),
        "activation is exact GELU (erf)",
    ),
    ("gpt2", "layers.0.attn.keys", lambda c, p, n, b, s: true.store(c, p, n, b, s + 1), "cache slot off by one"),
    ("gpt2", "embed.positions", lambda c, p, x: true.embed(c, p, jnp.maximum(x - 1, 0)), "position ids off by one"),
    ("llama", "rope.angles", with_config(true.angles, rope_theta=5e5), "wrong rope theta"),
    ("llama", K, interleaved, "RoPE pairs interleaved instead of half-split"),
    ("llama", "layers.0.attn.scores", tiled(true.scores), "kv heads tiled instead of repeated"),
    (
        "llama",
        "layers.1.attn.scores",
        lambda c, p, q, k: true.scores(c, p, q, k) * c.head_dim**0.5,
        "attention scale missing",
    ),
    ("llama", "layers.0.mlp_residual", summed(1, 0), "residual branch dropped"),
)
FURTHER: tuple[Fault, ...] = (
    ("llama", "layers.1.mlp.act", lambda c, p, g, u: true.gated_activation(c, p, u, g), "gate and up swapped"),
    ("gpt2", "layers.1.attn.out", lambda c, p, x: x @ p["kernel"].T + p["bias"], "kernel transposed"),
    ("gpt2", NORM, norm(freedom=1), "variance divided by D - 1 in the norm"),
    ("gpt2", NORM, norm(0.0), "norm eps wrong"),
    ("gpt2", NORM, norm(outside=True), "norm eps outside the square root"),
    ("gpt2", NORM, norm(plus=1), "norm weight used as 1 + w"),
    ("gpt2", NORM, norm(bias=0), "norm bias missing"),
    ("gpt2", NORM, norm(bias=2), "norm bias added twice"),
    ("gpt2", NORM, norm(centred=False), "mean not subtracted in the norm"),
    ("gpt2", NORM, with_config(true.norm, norm="rmsnorm"), "LayerNorm and RMSNorm confused"),
    ("plain", NORM, with_config(true.norm, norm="layernorm"), "LayerNorm and RMSNorm confused"),
    ("plain", NORM, norm(outside=True), "norm eps outside the square root"),
    ("plain", NORM, norm(1e-6), "norm eps wrong"),
    ("gpt2", NORM, lambda c, p, x: true.norm(c, p, x) * 6, "output multiplied by a constant"),
    ("gpt2", "final_norm", lambda c, p, x: x, "norm left out"),
    (
        "gpt2",
        "embed.positions",
        lambda c, p, x: true.embed(c, p, counted(x)),
        "position ids do not restart with a document",
    ),
    ("gpt2", "embed.tokens", lambda c, p, x: true.embed(c, p, x) * 6.0, "embedding multiplied by √D"),
    ("gpt2", "embed.sum", summed(1, 0), "position embedding not added"),
    ("gpt2", "layers.0.attn_residual", summed(1, 0.377), "residual branch scaled"),
    ("gpt2", "layers.0.attn_residual", summed(1, 2), "residual branch added twice"),
    ("gpt2", "layers.0.mlp.up", lambda c, p, x: x @ p["kernel"], "bias dropped"),
    ("gpt2", "layers.0.mlp.up", narrow(true.projection, jnp.float16), "computed in float16"),
    ("gpt2", "mask", lambda c, p, s, k, *g: true.attention_mask(c, p, s - 1, k, *g), "causal mask off by one"),
    ("gpt2", "mask", lambda c, p, s, k, *g: true.attention_mask(c, p, s, k, None, None), "documents not separated"),
    ("gpt2", "mask", lambda c, p, s, k, *g: true.attention_mask(c, p, s + 99, k, *g), "no causal mask"),
    ("gpt2", "mask", windowed, "sliding window"),
    ("gpt2", MASKED, lambda c, p, s, m: s, "no attention mask at all"),
    ("gpt2", MASKED, lambda c, p, s, m: jnp.where(triangle(s, 0), s, true.MASKED), "documents not separated"),
    ("gpt2", MASKED, lambda c, p, s, m: jnp.where(triangle(s, 1) & (m | ~triangle(s, 0)), s, true.MASKED), UNKNOWN),
    ("gpt2", "layers.1.attn.weights", lambda c, p, x: jax.nn.softmax(x, axis=-2), "softmax over the wrong axis"),
    ("gpt2", "layers.1.attn.weights", narrow(true.softmax, jnp.bfloat16), "computed in bfloat16"),
    (
        "gpt2",
        "layers.1.attn.context",
        lambda c, p, w, v: true.context(c, p, w.swapaxes(-1, -2), v),
        "queries and keys exchanged",
    ),
    (
        "gpt2",
        "layers.1.attn.q_heads",
        lambda c, p, x: x.reshape(*x.shape[:2], 9, 4).transpose(0, 3, 1, 2),
        "heads split or merged dimension by dimension",
    ),
    (
        "gpt2",
        "layers.1.attn.merged",
        lambda c, p, x: x.reshape(x.shape[0], x.shape[2], -1),
        "heads and time not exchanged",
    ),
    ("gpt2", "layers.1.mlp.act", activation(lambda x: x), "activation missing"),
    ("gpt2", "logits", lambda c, p, x: -true.head(c, p, x), "output has the wrong sign"),
    ("gpt2", "logits", lambda c, p, x: 30 * jnp.tanh(true.head(c, p, x) / 30), "logits soft-capped"),
    ("gpt2", "logits", narrow(true.head, jnp.bfloat16), "computed in bfloat16"),
    ("gpt2", "layers.0.attn.values", lambda c, p, n, b, s: b, "new keys and values not stored"),
    (
        "gpt2",
        "layers.0.attn.values",
        lambda c, p, n, b, s: true.store(c, p, n, b, jnp.broadcast_to(s[:1], s.shape)),
        "first row's values used for the whole batch",
    ),
    (
        "gpt2",
        "layers.0.attn.values",
        lambda c, p, n, b, s: true.store(c, p, n, b, s + (s.shape[1] == 1)),
        "cache slot off by one",
    ),
    ("llama", "rope.angles", with_config(true.angles, rope_scaling=None), "rope scaling ignored"),
    ("llama3", "rope.angles", with_config(true.angles, rope_scaling=None), "rope scaling ignored"),
    ("llama3", "rope.angles", with_config(true.angles, rope_theta=1e4), "wrong rope theta"),
    ("llama", "rope.angles", with_config(true.angles, rope_theta=3e5, rope_scaling=None), "wrong rope theta"),
    ("llama3", "rope.angles", with_config(true.angles, rope_theta=1e4, rope_scaling=None), "wrong rope theta"),
    ("plain", "rope.angles", with_config(true.angles, rope_scaling=RopeScaling("linear", 8.0)), "wrong rope scaling"),
    ("plain", "rope.angles", with_config(true.angles, rope_scaling=RopeScaling("llama3", 8.0)), "wrong rope scaling"),
    ("llama", "rope.angles", lambda c, p, x: true.angles(c, p, x + 1), "position ids off by one"),
    (
        "llama",
        "rope.angles",
        lambda c, p, x: true.angles(c, p, counted(x)),
        "position ids do not restart with a document",
    ),
    (
        "llama",
        "rope.angles",
        lambda c, p, x: true.angles(c, p, jnp.broadcast_to(x[:1], x.shape)),
        "first row's values used for the whole batch",
    ),
    ("llama", Q, lambda c, p, x, a: true.rope(c, p, x, -a), "RoPE direction reversed"),
    ("llama", Q, lambda c, p, x, a: x, "RoPE missing"),
    ("llama", Q, lambda c, p, x, a: true.rope(c, p, true.rope(c, p, x, a), a), "RoPE applied twice"),
    (
        "llama",
        Q,
        lambda c, p, x, a: jnp.concatenate([true.rope(c, p, x[..., :8], a[..., :4]), x[..., 8:]], -1),
        "RoPE on part of the head only",
    ),
    ("llama", Q, narrow(true.rope, jnp.bfloat16), "computed in bfloat16"),
    ("llama", "layers.0.attn.context", tiled(true.context), "kv heads tiled instead of repeated"),
    ("llama", "layers.1.attn.scores", regrouped(true.scores), "query heads grouped in another order"),
    ("llama", "layers.0.attn.context", regrouped(true.context), "query heads grouped in another order"),
    (
        "llama",
        "layers.0.attn.context",
        lambda c, p, w, v: true.context(c, p, w, v[:, ::-1]),
        "kv heads in the wrong order",
    ),
    (
        "llama",
        "layers.1.attn.scores",
        lambda c, p, q, k: true.scores(c, p, q, k) * c.head_dim**-0.5,
        "attention scale applied twice",
    ),
    (
        "llama",
        "layers.1.attn.scores",
        lambda c, p, q, k: true.scores(c, p, q, k) * (c.head_dim / c.hidden_size) ** 0.5,
        "attention scale of another width",
    ),
    (
        "llama",
        "layers.1.attn.scores",
        lambda c, p, q, k: 50 * jnp.tanh(true.scores(c, p, q, k) / 50),
        "attention scores soft-capped",
    ),
    ("llama", "layers.1.mlp.act", activation(jax.nn.gelu), "activation is tanh GELU"),
    ("llama", "layers.1.mlp.act", lambda c, p, g, u: jax.nn.silu(g), "up projection ignored in the gated MLP"),
)


def called(fault: Fault) -> str:
    return f"{fault[0]}-{fault[1]}-{fault[3]}".replace(" ", "_")


def parameters() -> list[Any]:
    """Each cause and each family is in `make test`; another plant of one that is there already is exhaustive."""
    cases: list[Any] = []
    seen: set[str] = set()
    for fault in FIRST + FURTHER:
        family, _, _, cause = fault
        marks = [pytest.mark.exhaustive] if {family, cause} <= seen and fault in FURTHER else []
        cases.append(pytest.param(*fault, id=called(fault), marks=marks))
        seen |= {family, cause}
    return cases


@pytest.mark.parametrize(("family", "tap", "function", "cause"), parameters())
def test_a_wrong_op_is_named_and_proved_by_undoing_it(
    cases: Any, family: str, tap: str, function: Function, cause: str
):
    key = "attention_mask" if tap == "mask" else tap
    found = cases(family).bisect({key: function})
    assert names(found) == [cause], [(each.name, each.change, each.tied) for each in found.causes]
    (named,) = found.causes
    assert named.tap == tap
    assert not named.tied
    assert named.proved is (cause != UNKNOWN)
    if cause != UNKNOWN:
        assert named.after.ok
        assert found.repaired is not None
        assert found.repaired.verdict == "pass"


@pytest.mark.parametrize(
    ("family", "tap", "function", "cause"),
    [
        ("gpt2", NORM, norm(1e-2), "norm eps wrong"),
        ("llama", "layers.1.attn.scores", tiled(true.scores), "kv heads tiled instead of repeated"),
        *(
            pytest.param(*fault, marks=pytest.mark.exhaustive)
            for fault in (
                ("gpt2", NORM, norm(bias=0), "norm bias missing"),
                ("gpt2", "layers.1.mlp.act", activation(lambda x: x), "activation missing"),
                ("gpt2", "layers.0.mlp.up", lambda c, p, x: x @ p["kernel"], "bias dropped"),
                ("llama", Q, lambda c, p, x, a: x, "RoPE missing"),
                ("llama", "layers.0.mlp_residual", summed(1, 2), "residual branch added twice"),
            )
        ),
    ],
    # A function's default id has its address, which differs between test processes.
    ids=lambda value: "" if callable(value) else value,
)
def test_a_repair_reaches_the_noise_of_bfloat16_too(cases: Any, family: str, tap: str, function: Function, cause: str):
    found = cases(family, "bfloat16").bisect({tap: function})
    assert names(found) == [cause]
    assert found.causes[0].proved


# -- What is not in the catalogue ------------------------------------------------------

ODD: dict[str, tuple[str, Function]] = {
    "a ripple on the norm": (NORM, lambda c, p, x: true.norm(c, p, x) + 0.01 * jnp.sin(x)),
    "one position of a projection": ("layers.0.mlp.up", lambda c, p, x: true.projection(c, p, x).at[:, 3].mul(1.1)),
    "one hidden key": ("attention_mask", lambda c, p, *x: true.attention_mask(c, p, *x).at[0, 0, 7, 3].set(False)),
    "an activation with a kink": (
        "layers.1.mlp.act",
        activation(lambda x: true.gelu_new(x) * jnp.where(x > 1, 1.1, 1)),
    ),
    "a mean that leaks into the context": (
        "layers.0.attn.context",
        lambda c, p, w, v: true.context(c, p, w, v) + v[:, :, :1].mean(),
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_fault_that_no_repair_undoes_is_located_and_stays_unknown(cases: Any, odd: str):
    tap, function = ODD[odd]
    found = cases("gpt2").bisect({tap: function})
    assert names(found) == [UNKNOWN]
    (cause,) = found.causes
    assert cause.tap == ("mask" if tap == "attention_mask" else tap)
    assert not cause.proved
    assert found.repaired is not None
    assert found.repaired.verdict == "pass", "the reference's own op stands in for it"


# -- More than one ---------------------------------------------------------------------


def test_two_faults_at_once_are_both_named_in_order(cases: Any):
    found = cases("gpt2").bisect({"layers.0.attn_residual": summed(1, 2), "layers.1.mlp.act": activation(lambda x: x)})
    assert names(found) == ["residual branch added twice", "activation missing"]
    assert all(cause.proved for cause in found.causes)


def test_two_faults_of_one_kind_of_op_are_told_apart(cases: Any):
    ripple = ODD["a ripple on the norm"][1]
    found = cases("gpt2").bisect({"layers.0.attn_norm": ripple, "layers.1.mlp_norm": norm(1e-3)})
    assert names(found) == [UNKNOWN, "norm eps wrong"]


def test_a_fault_in_every_layer_is_one_cause(cases: Any):
    found = cases("gpt2").bisect({"split_query_heads": lambda c, p, x: true.split_query_heads(c, p, x)[:, ::-1]})
    assert names(found) == ["heads in reverse order"]
    assert found.causes[0].also_at == ["layers.1.attn.q_heads"]


def test_a_wrong_field_of_the_config_is_undone_in_the_config(cases: Any):
    case = cases("gpt2")
    config = dataclasses.replace(case.candidate.config, rms_norm_eps=1e-3)
    found = case.bisect({}, config=config)
    assert names(found) == ["norm eps wrong"]
    assert "config" in found.causes[0].change


# -- The store -------------------------------------------------------------------------


def test_a_true_store_is_exact_and_a_narrow_one_is_not(cases: Any):
    case = cases("gpt2")
    (clean,) = case.bisect({}).rungs
    stores = [finding for finding in clean.findings if finding.op == "store"]
    assert [finding.tap for finding in stores[:4:2]] == ["layers.0.attn.keys", "layers.0.attn.values"]
    assert {finding.where for finding in stores} == {"prefill", "step"}
    assert all(finding.ok and finding.error == 0 for finding in stores)
    found = case.bisect({"layers.1.attn.values": narrow(true.store, jnp.bfloat16)})
    assert names(found) == ["cache dtype too low"]
    assert found.causes[0].tied == ["computed in bfloat16"]


def test_an_answer_in_a_narrower_dtype_is_measured_as_the_model_computes(cases: Any):
    found = cases("gpt2").bisect({"logits": lambda c, p, x: true.head(c, p, x).astype(jnp.bfloat16)})
    assert found.verdict == "fail"
    assert names(found) == ["computed in bfloat16"]
