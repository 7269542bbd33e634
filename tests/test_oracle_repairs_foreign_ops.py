"""Parts of other models planted in ours (ALiBi, QK-norm, post-norm, …): named, and proved by undoing them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import model, taps
from jaxgpt import ops as true
from jaxgpt.config import RopeScaling
from jaxgpt.taps import Op
from oracle import diagnosis, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.results import UNKNOWN, Report

pytestmark = pytest.mark.slow

SHORT = 24
_LLAMA = {"num_hidden_layers": 2, "max_position_embeddings": SHORT}
FAMILIES = {
    "gpt2": models.MODELS["gpt2"] | {"n_layer": 2, "n_positions": SHORT},
    "erf": models.MODELS["gpt2-erf-untied"] | {"n_layer": 2, "n_positions": SHORT},
    "deep": models.MODELS["gpt2"] | {"n_layer": 4, "n_positions": SHORT},
    "llama": models.MODELS["llama"] | _LLAMA,
    "linear": models.MODELS["llama-square-biased-tied-linear"] | _LLAMA,
    "llama3": models.MODELS["llama3-scaling"] | _LLAMA,
}
SEED = 97
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    candidate: Candidate
    reference: Reference
    folder: Path

    def bisect(self, rung: str, source: Path | None = None, **changed: Any) -> Report:
        candidate = dataclasses.replace(self.candidate, **changed)
        comparison = Comparison(candidate, self.reference, None, source, noise.stored_calibration(), SEED)
        return diagnosis.bisect(comparison, rungs=(rung,))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    made: dict[tuple[str, str], Case] = {}

    def case(family: str, dtype: str = "float32") -> Case:
        if (family, dtype) not in made:
            folder: Path = models.write(FAMILIES[family], tmp_path_factory.mktemp(family), dtype, SEED)
            made[family, dtype] = Case(models.candidate(folder, dtype), Reference.load(folder, dtype), folder)
        return made[family, dtype]

    return case


def named(found: Report) -> list[tuple[str, list[str]]]:
    return [(cause.name, list(cause.tied)) for cause in found.causes]


def assert_repaired(found: Report) -> None:
    assert all(cause.proved and cause.advice for cause in found.causes)
    assert found.repaired is not None
    assert found.repaired.verdict == "pass"


# -- Ops -------------------------------------------------------------------------------


def wide(x: Any) -> Any:
    return x.astype(jnp.float32)


def with_config(function: Function, **fields: Any) -> Function:
    return lambda c, p, *x: function(dataclasses.replace(c, **fields), p, *x)


def alibi(c: Any, p: Any, q: Any, k: Any) -> Any:
    y = true.scores(c, p, q, k)
    slopes = 2.0 ** (-8 * (1 + jnp.arange(y.shape[1])) / y.shape[1])
    return y + slopes[:, None, None] * (jnp.arange(y.shape[-1]) - jnp.arange(y.shape[-2])[:, None])


def keyed_alibi(c: Any, p: Any, q: Any, k: Any) -> Any:
    y = true.scores(c, p, q, k)
    return y + 2.0 ** -(1.0 + jnp.arange(y.shape[1]))[:, None, None] * jnp.arange(y.shape[-1])


def qk_norm(split: Function, eps: float = 1e-6, centred: bool = False) -> Function:
    def op(c: Any, p: Any, *x: Any) -> Any:
        y = wide(split(c, p, *x))
        y = y - y.mean(-1, keepdims=True) if centred else y
        return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x[0].dtype)

    return op


def sine_for_cosine(c: Any, p: Any, x: Any, angles: Any) -> Any:
    cos, sin = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def base_two(c: Any, p: Any, x: Any) -> Any:
    y = jnp.exp2(x - x.max(-1, keepdims=True))
    return y / y.sum(-1, keepdims=True)


def overflowing(c: Any, p: Any, x: Any) -> Any:
    # Scores of these small models are small: as if they were larger by 84.
    y = jnp.exp(x) * jnp.exp(84.0)
    return y / y.sum(-1, keepdims=True)


def affine_off(c: Any, p: Any, x: Any) -> Any:
    """torch.nn.LayerNorm(elementwise_affine=False)."""
    return true.norm(c, {"weight": jnp.ones_like(p["weight"]), "bias": jnp.zeros_like(p["bias"])}, x)


def weightless(c: Any, p: Any, x: Any) -> Any:
    return true.norm(c, {**p, "weight": jnp.ones_like(p["weight"])}, x)


def weightless_product(c: Any, p: Any, x: Any) -> Any:
    y = wide(x) - wide(x).mean(-1, keepdims=True)
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + c.rms_norm_eps)
    return (y + wide(p["bias"])).astype(x.dtype)


def weightless_without_eps(c: Any, p: Any, x: Any) -> Any:
    y = x - x.mean(-1, keepdims=True)
    return y / y.std(-1, keepdims=True) + p["bias"]


def exponents_over(width: int) -> Function:
    def op(c: Any, p: Any, x: Any) -> Any:
        frequencies = c.rope_theta ** (-2 * jnp.arange(c.head_dim // 2) / width)
        return wide(x)[..., None] * frequencies

    return op


def rounded(function: Function, dtype: Any, before: bool) -> Function:
    def op(c: Any, p: Any, x: Any, *rest: Any) -> Any:
        x = x.astype(dtype).astype(x.dtype) if before else x
        y = function(c, p, x, *rest)
        return y if before else y.astype(dtype).astype(y.dtype)

    return op


def multiplied(function: Function, by: float) -> Function:
    return lambda c, p, *x: (function(c, p, *x) * by).astype(function(c, p, *x).dtype)


Fault = tuple[str, str, str, Function, str, list[str]]
"""Family, dtype, where it is planted, the wrong op, the cause that must be named, and those that are the same."""
F32, BF16 = "float32", "bfloat16"
LINEAR, LLAMA3 = RopeScaling("linear", 8.0), RopeScaling("llama3", 4.0, 1.0, 4.0, 32)
MASKED, WEIGHTS, LAYER1 = "layers.1.attn.masked", "layers.1.attn.weights", "layers.1.attn_norm"
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FAULTS: dict[str, Fault] = {
    "multiplied mask": (
        "gpt2", F32, MASKED, lambda c, p, s, m: s * m, "mask multiplied into the scores", [],
    ),
    "zero for masked": (
        "llama", BF16, MASKED, lambda c, p, s, m: jnp.where(m, s, 0), "mask multiplied into the scores", [],
    ),
    "added mask": ("gpt2", F32, MASKED, lambda c, p, s, m: s + m, "mask added to the scores as 0 and 1", []),
    "added mask narrow": (
        "llama", BF16, MASKED, lambda c, p, s, m: s + m.astype(s.dtype), "mask added to the scores as 0 and 1", [],
    ),
    "alibi": ("gpt2", F32, "layers.0.attn.scores", alibi, "linear position bias added to the scores", []),
    "alibi narrow": ("llama", BF16, "scores", alibi, "linear position bias added to the scores", []),
    "alibi by key": ("llama", F32, "scores", keyed_alibi, "linear position bias added to the scores", []),
    "qk norm": (
        "gpt2", F32, "layers.1.attn.q_heads", qk_norm(true.split_query_heads), "queries or keys normalised", [],
    ),
    "qk norm narrow": (
        "llama", BF16, "layers.0.attn.k_heads", qk_norm(true.split_kv_heads), "queries or keys normalised", [],
    ),
    "qk layer norm": (
        "llama", F32, "layers.0.attn.k_heads", qk_norm(true.split_kv_heads, 1e-5, True), "queries or keys normalised",
        [],
    ),
    "qk norm behind rope": ("llama", F32, "rope", qk_norm(true.rope), "queries or keys normalised", []),
    "base two": ("gpt2", F32, WEIGHTS, base_two, "softmax in base 2 instead of e", []),
    "base two narrow": ("llama", BF16, WEIGHTS, base_two, "softmax in base 2 instead of e", []),
    "sine and cosine": (
        "llama", F32, "layers.0.attn.q_rope", sine_for_cosine, "RoPE sine and cosine exchanged", [],
    ),
    "sine and cosine narrow": ("linear", BF16, "rope", sine_for_cosine, "RoPE sine and cosine exchanged", []),
    "norm without weight": ("erf", F32, LAYER1, weightless, "norm weight missing", []),
    "norm without parameters": ("erf", F32, LAYER1, affine_off, "norm weight missing", []),
    "norm without product": ("erf", F32, LAYER1, weightless_product, "norm weight missing", []),
    "norm without weight narrow": ("gpt2", BF16, "layers.1.mlp_norm", weightless, "norm weight missing", []),
    "norm divided by its weight": (
        "gpt2", F32, LAYER1, lambda c, p, x: true.norm(c, p, x) / p["weight"], "norm weight missing", [],
    ),
    "norm without weight and eps": (
        "erf", F32, LAYER1, weightless_without_eps, "norm weight missing", [],
    ),
    "rms norm without weight": ("llama", F32, LAYER1, weightless, "norm weight missing", []),
    "llama3 as linear": (
        "llama3", F32, "angles", with_config(true.angles, rope_scaling=LINEAR), "wrong rope scaling", [],
    ),
    "linear as llama3": (
        "linear", F32, "angles", with_config(true.angles, rope_scaling=LLAMA3), "wrong rope scaling", [],
    ),
    "exponents over D": (
        "llama", F32, "angles", exponents_over(42), "RoPE exponents divided by another width", ["wrong rope theta"],
    ),
    "positions doubled": (
        "llama", BF16, "angles", lambda c, p, x: true.angles(c, p, 2 * x), "positions multiplied by a constant",
        ["wrong rope scaling"],
    ),
    "positions doubled under llama3": (
        "llama3", F32, "angles", lambda c, p, x: true.angles(c, p, 2 * x), "positions multiplied by a constant",
        ["wrong rope scaling"],
    ),
    "temperature": ("gpt2", BF16, "logits", multiplied(true.head, 0.7), "output multiplied by a constant", []),
    "temperature in a llama": (
        "llama", BF16, "logits", multiplied(true.head, 1 / 0.8), "output multiplied by a constant", [],
    ),
    "branch in bf16": (
        "llama", BF16, "layers.1.mlp.down", multiplied(true.projection, 1.5), "output multiplied by a constant", [],
    ),
    "float8 in": (
        "gpt2", BF16, "layers.0.mlp.up", rounded(true.projection, E4M3, True), "computed in float8_e4m3fn", [],
    ),
    "float8 out": (
        "llama", BF16, "layers.0.attn.q", rounded(true.projection, E5M2, False), "computed in float8_e5m2", [],
    ),
    "float8 in float32": (
        "gpt2", F32, "layers.0.attn.q", rounded(true.projection, E5M2, True), "computed in float8_e5m2", [],
    ),
    "narrow cache": (
        "llama", BF16, "layers.0.attn.keys", rounded(true.store, E4M3, True), "cache dtype too low",
        ["computed in float8_e4m3fn"],
    ),
    "narrow cache in float32": (
        "gpt2", F32, "store", rounded(true.store, jnp.bfloat16, True), "cache dtype too low", ["computed in bfloat16"],
    ),
    "overflowing softmax": ("gpt2", F32, WEIGHTS, overflowing, "softmax without its maximum subtracted", []),
    "softmax over queries": (
        "llama", F32, WEIGHTS, lambda c, p, x: jax.nn.softmax(x, -2), "softmax over the wrong axis", [],
    ),
}  # fmt: skip
QUICK = ("multiplied mask", "alibi narrow")


def parameters(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(name, id=name.replace(" ", "_"), marks=[] if name in QUICK else pytest.mark.exhaustive)
        for name in table
    ]


@pytest.mark.parametrize("fault", parameters(FAULTS))
def test_a_part_of_another_model_is_named_and_proved_by_undoing_it(cases: Any, fault: str):
    family, dtype, tap, function, cause, tied = FAULTS[fault]
    found = cases(family, dtype).bisect("operators", replace={tap: function})
    assert named(found) == [(cause, tied)]
    assert_repaired(found)


ODD: dict[str, tuple[str, str, str, Function]] = {
    "a bias that grows with the square of the distance": (
        "gpt2", F32, "layers.0.attn.scores", lambda c, p, q, k: true.scores(c, p, q, k)
        + 0.01 * jnp.square(jnp.arange(k.shape[2]) - jnp.arange(q.shape[2])[:, None]),
    ),
    "softmax in base 3": (
        "gpt2", F32, WEIGHTS, lambda c, p, x: true.softmax(c, p, jnp.maximum(1.0986123 * x, true.MASKED)),
    ),
    "half of the heads normalised": (
        "gpt2", F32, "layers.0.attn.q_heads", lambda c, p, x: qk_norm(true.split_query_heads)(c, p, x)
        .at[:, :2].set(true.split_query_heads(c, p, x)[:, :2]),
    ),
    "a mask added as 0 and 2": ("gpt2", F32, MASKED, lambda c, p, s, m: s + 2 * m),
    "a positive mask value": ("gpt2", F32, MASKED, lambda c, p, s, m: jnp.where(m, s, 3.0)),
    "a weight that is half missing": (
        "erf", F32, LAYER1, lambda c, p, x: true.norm(c, {**p, "weight": p["weight"].at[:7].set(1)}, x),
    ),
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("odd", ODD)
def test_what_only_resembles_it_stays_unknown(cases: Any, odd: str):
    family, dtype, tap, function = ODD[odd]
    assert named(cases(family, dtype).bisect("operators", replace={tap: function})) == [(UNKNOWN, [])]


# -- Layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("with_folder", [False, True])
def test_a_config_of_one_layer_fewer_is_named(cases: Any, family: str, with_folder: bool):
    case = cases(family)
    config = dataclasses.replace(case.candidate.config, num_hidden_layers=1)
    found = case.bisect("operators", case.folder if with_folder else None, config=config)
    assert found.causes[0].tap == "layers.1.attn_norm"
    assert named(found) == [("config field num_hidden_layers differs from the folder's", [])]
    assert "num_hidden_layers 2, as the folder says, not 1" in found.causes[0].change
    assert_repaired(found)


def through(table: Callable[[Any], tuple[Op, ...]]) -> Any:
    """A forward that goes through another table."""

    def forward(c: Any, params: Any, ids: Any, *, positions: Any, segments: Any, replace: Any = model.UNCHANGED) -> Any:
        values = model.run(c, params, table(c), model.uncached_inputs(ids, positions, segments), replace=replace)
        return model.Output(values["logits"], {op.tap: values[op.tap] for op in taps.ops(c)})

    return forward


def in_order(*order: int) -> Any:
    """Layers in another order, each under its own name."""

    def table(c: Any) -> tuple[Op, ...]:
        own = [op for op in taps.ops(c) if not op.tap.startswith("layers.")]
        first, last = own[:-2], own[-2:]
        stream, chosen = taps.layer_input(c, 0, taps.Wiring()), []
        for layer in order:
            wanted = taps.layer_input(c, layer, taps.Wiring())
            chosen += [_given(op, {wanted: stream}) for op in taps.layer_ops(c, layer, taps.Wiring())]
            stream = f"layers.{layer}.mlp_residual"
        return (*first, *chosen, _given(last[0], {last[0].inputs[0]: stream}), last[1])

    return through(table)


def _given(op: Op, other: dict[str, str]) -> Op:
    return dataclasses.replace(op, inputs=tuple(other.get(name, name) for name in op.inputs))


def with_parameters_of(*order: int) -> Any:
    """Layers under each other's names."""

    def table(c: Any) -> tuple[Op, ...]:
        def other(op: Op) -> Op:
            layer = op.parameters.split(".")[1:2]
            if not op.parameters.startswith("layers."):
                return op
            return dataclasses.replace(
                op, parameters=op.parameters.replace(f".{layer[0]}.", f".{order[int(layer[0])]}.", 1)
            )

        return tuple(map(other, taps.ops(c)))

    return through(table)


def post_norm(c: Any) -> tuple[Op, ...]:
    """x = norm(x + f(x)), as in Vaswani et al. 2017, figure 1."""
    own = [op for op in taps.ops(c) if not op.tap.startswith("layers.")]
    first, last = own[:-2], own[-2:]
    table, stream = list(first), taps.layer_input(c, 0, taps.Wiring())
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}"
        ops = [op for op in taps.layer_ops(c, layer, taps.Wiring()) if not op.tap.endswith("_norm")]
        for op in ops:
            table.append(
                _given(op, {f"{at}.attn_norm": stream, f"{at}.mlp_norm": stream, op.inputs[0]: stream})
                if op.function == "add"
                else _given(op, {f"{at}.attn_norm": stream, f"{at}.mlp_norm": stream})
            )
            if op.function == "add":
                stream = op.tap.replace("residual", "norm")
                table.append(Op(stream, "norm", (op.tap,), stream))
    return (*table, _given(last[0], {last[0].inputs[0]: stream}), last[1])


ORDERS: dict[str, tuple[str, str, Any, str, list[str]]] = {
    "reversed": ("gpt2", F32, in_order(1, 0), "layers run in the wrong order", []),
    "reversed narrow": ("llama", BF16, in_order(1, 0), "layers run in the wrong order", []),
    "two exchanged": ("deep", F32, in_order(0, 2, 1, 3), "layers run in the wrong order", []),
    "rotated": ("deep", F32, in_order(1, 2, 3, 0), "layers run in the wrong order", []),
    "reversed by name": (
        "gpt2", F32, with_parameters_of(1, 0), "layers run in the wrong order",
        ["an op uses another module's parameters"],
    ),
    "exchanged by name": (
        "deep", F32, with_parameters_of(0, 2, 1, 3), "layers run in the wrong order",
        ["an op uses another module's parameters"],
    ),
    "post-norm": ("gpt2", F32, through(post_norm), "post-norm instead of pre-norm", []),
    "post-norm in a llama": ("llama", F32, through(post_norm), "post-norm instead of pre-norm", []),
    "post-norm narrow": ("llama", BF16, through(post_norm), "post-norm instead of pre-norm", []),
}  # fmt: skip


@pytest.mark.parametrize("fault", parameters(ORDERS))
def test_layers_and_norms_in_another_order_are_named_and_put_back(cases: Any, fault: str):
    family, dtype, forward_pass, cause, tied = ORDERS[fault]
    found = cases(family, dtype).bisect("forward", forward_pass=forward_pass)
    assert named(found) == [(cause, tied)], [(each.tap, each.change) for each in found.causes]
    assert_repaired(found)
