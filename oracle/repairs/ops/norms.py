"""Repairs of norms: one formula with all the places at which programs differ, and the right one less a wrong one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, Maker, nice, op_repair, shape_of, wide
from oracle.repairs.repair import Repair

IN_NORM = "the norm op in jaxgpt/ops.py"


@dataclass(frozen=True)
class Form:
    """One way of writing a norm."""

    centred: bool
    """The mean is subtracted."""
    about_mean: bool
    """The spread is that about the mean, not about zero."""
    eps: float
    freedom: int = 0
    """Subtracted from D where the squares are averaged."""
    weighted: bool = True
    one_plus: bool = False
    """Multiplied by 1 + w instead of w."""
    biases: int = 1
    """How often the bias is added."""
    axes: tuple[int, ...] = (-1,)
    """What is averaged over."""

    def __call__(self, p: Leaves, x: Any) -> Any:
        """The norm of x."""
        less_mean = x - x.mean(self.axes, keepdims=True)
        square = jnp.square(less_mean if self.about_mean else x).mean(self.axes, keepdims=True)
        square = square * (x.shape[-1] / (x.shape[-1] - self.freedom))
        y = (less_mean if self.centred else x) / jnp.sqrt(square + self.eps)
        if self.weighted:
            y = y * (1 + p["weight"] if self.one_plus else p["weight"])
        return y + self.biases * p["bias"] if "bias" in p else y


def right(box: BlackBox) -> Form:
    """As the reference writes it."""
    return Form(box.facts.centred, box.facts.centred, box.facts.eps)


def written(named: str, change: Callable[[Form], Form]) -> Maker:
    """The difference to a form that is written otherwise."""

    def maker(box: BlackBox) -> Iterator[Change]:
        proper = right(box)
        wrong = change(proper)
        # A norm without a bias is the same however often it is added.
        if wrong != proper and ("bias" in box.parameters or wrong.biases == proper.biases):
            yield box.less(wrong, proper, named, "the reference's norm")

    return maker


def reweighted(by: Callable[[Any], Any]) -> Maker:
    """Without its bias multiplied: a sum would leave the rounding of what is large where the weight is small."""

    def maker(box: BlackBox) -> Iterator[Change]:
        factor, bias = by(box.parameters["weight"]), box.parameters.get("bias", np.float32(0))
        if np.isfinite(factor).all():
            yield box.turned(
                "with the bias taken away, the weight put right and the bias added again",
                lambda y, _: (wide(y) - bias) * factor + bias,
            )

    return maker


def divided_by_weight(box: BlackBox) -> Iterator[Change]:
    """The weight is taken back after the bias was added."""
    if "bias" in box.parameters:
        yield box.turned("with its output multiplied by the weight", lambda y, _: wide(y) * box.parameters["weight"])


def _of_one_plus(weight: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return weight / (1 + weight)


def other_kind(box: BlackBox) -> Iterator[Change]:
    """LayerNorm for RMSNorm, or the reverse."""
    proper = right(box)
    kind = "layernorm" if proper.centred else "rmsnorm"
    yield from box.configured(f"with {kind} in the config", norm=kind)
    other = replace(proper, centred=not proper.centred, about_mean=not proper.centred)
    names = ("RMSNorm", "LayerNorm") if proper.centred else ("LayerNorm", "RMSNorm")
    yield box.less(other, proper, *names)
    if "bias" in box.parameters:
        yield box.less(replace(other, biases=0), proper, f"{names[0]} without bias", names[1])


def uncentred(form: Form) -> Form:
    """The variance is right, the mean stays in the numerator."""
    return replace(form, centred=False)


def other_spread(form: Form) -> Form:
    """The mean square about zero for the variance, or the reverse."""
    return replace(form, about_mean=not form.about_mean)


# -- Epsilon ---------------------------------------------------------------------------

TINY = 2.0**-30
"""Rows so small that nothing but epsilon is under the root."""


def epsilon(box: BlackBox) -> Iterator[Change]:
    """Read the epsilon off the op's answer to tiny rows; scale the input so that it acts as the right one."""
    yield from box.configured(f"with eps {box.facts.eps:g} in the config", rms_norm_eps=box.facts.eps)
    used = _epsilon_in_use(box)
    if used is None or abs(used - box.facts.eps) <= 0.01 * box.facts.eps:
        return
    change = f"with eps {box.facts.eps:g} instead of {used:g}"
    yield (change, _as_if(box, used)) if used else _divided(box, change, lambda root: root)


def outside(box: BlackBox) -> Iterator[Change]:
    """Divided by root + eps."""
    eps = np.float32(box.facts.eps)
    yield _divided(box, "with the eps inside the square root", lambda root: root + eps)


def _epsilon_in_use(box: BlackBox) -> float | None:
    """Nothing where the answer is no multiple of the plain norm."""
    given = np.asarray(box.site.inputs[0])
    x = given.astype(np.float64)
    x = (TINY * x / np.maximum(x.std(-1, keepdims=True), np.finfo(np.float64).tiny)).astype(given.dtype)
    y, x = box.without_bias([x]).astype(np.float64), x.astype(np.float64)
    spread = x - x.mean(-1, keepdims=True) if box.facts.centred else x
    plain = spread * box.parameters["weight"]
    norm = float(np.square(plain).sum())
    scale = float((y * plain).sum()) / norm if norm else 0.0
    if scale <= 0 or not np.isfinite(y).all():
        return None
    # Without an epsilon each row has a scale of its own, about 1 / TINY.
    square = float(np.square(spread).mean())
    used = scale**-2 - square
    return nice(used, 0.01) if used > 0.5 * square else 0.0


def _as_if(box: BlackBox, used: float) -> Any:
    # f(g x) = g x / sqrt(g² v + used), which is x / sqrt(v + eps) for g² = used / eps: exact at any size of x.
    gain = np.float32((used / box.facts.eps) ** 0.5)

    def repaired(config: ModelConfig, p: Leaves, x: Any) -> Any:
        dtype = shape_of(box.function, config, p, x).dtype
        return box.function(config, p, x.astype(jnp.float32) * gain).astype(dtype)

    return repaired


def _divided(box: BlackBox, change: str, by: Callable[[Any], Any]) -> Change:
    """An op that divides by a function of the root mean square: its output, less the bias, times wrong over right."""
    bias = box.parameters.get("bias", np.float32(0))

    def output(y: Any, x: Any) -> Any:
        x = wide(x)
        square = jnp.square(x - x.mean(-1, keepdims=True) if box.facts.centred else x).mean(-1, keepdims=True)
        ratio = by(jnp.sqrt(square)) / jnp.sqrt(square + box.facts.eps)
        return (wide(y) - bias) * ratio + bias

    return box.turned(change, output)


def left_out(box: BlackBox) -> Iterator[Change]:
    """The norm applied to an output that is the input."""
    x = np.asarray(box.site.inputs[0]).astype(np.float32)
    if np.array_equal(box.answer, x):
        form, given = right(box), {name: jnp.asarray(array) for name, array in box.parameters.items()}
        yield box.turned("with the norm applied to its output", lambda y, _: form(given, wide(y)))


def over(*axes: int) -> Callable[[Form], Form]:
    """Statistics over other axes of (B, T, D) or (B, N, T, H)."""
    return lambda form: replace(form, axes=axes)


def over_all_heads(box: BlackBox) -> Iterator[Change]:
    """One root mean square for all heads of a token, where each head has its own."""
    if np.ndim(box.site.inputs[0]) == 4:
        yield from written("statistics over all heads together", over(-3, -1))(box)


_EPS = "check rms_norm_eps in the config (jaxgpt/config.py) and where the norm op adds it"
_TABLE: tuple[tuple[str, str, Maker], ...] = (
    ("norm left out", f"apply {IN_NORM}", left_out),
    ("norm eps wrong", _EPS, epsilon),
    (
        "norm eps outside the square root",
        f"add it to the mean square in {IN_NORM}",
        outside,
    ),
    ("LayerNorm and RMSNorm confused", f"check `norm` in the config and {IN_NORM}", other_kind),
    (
        "mean not subtracted in the norm",
        f"subtract it in {IN_NORM}",
        written("a norm that keeps the mean", uncentred),
    ),
    (
        "variance and mean square confused in the norm",
        f"check what is squared in {IN_NORM}",
        written("the other spread", other_spread),
    ),
    (
        "variance divided by D - 1 in the norm",
        f"divide by D in {IN_NORM}",
        written("the unbiased variance", lambda form: replace(form, freedom=1)),
    ),
    (
        "norm weight missing",
        f"multiply by the weight in {IN_NORM}",
        written("no weight", lambda form: replace(form, weighted=False)),
    ),
    (
        "norm weight missing",
        f"multiply by the weight and add the bias in {IN_NORM}",
        written("neither weight nor bias", lambda form: replace(form, weighted=False, biases=0)),
    ),
    ("norm weight missing", f"multiply by the weight in {IN_NORM}", reweighted(lambda w: w)),
    ("norm weight missing", f"multiply by the weight in {IN_NORM}", divided_by_weight),
    (
        "norm weight missing",
        f"multiply by the weight, and add eps, in {IN_NORM}",
        written("no weight and no eps", lambda form: replace(form, weighted=False, eps=0.0)),
    ),
    ("norm weight used as 1 + w", f"multiply by w, not 1 + w, in {IN_NORM}", reweighted(_of_one_plus)),
    (
        "norm weight used as 1 + w",
        f"multiply by w, not 1 + w, in {IN_NORM}",
        written("the weight 1 + w", lambda form: replace(form, one_plus=True)),
    ),
    (
        "norm bias missing",
        f"add the bias in {IN_NORM}",
        written("no bias", lambda form: replace(form, biases=0)),
    ),
    (
        "norm bias added twice",
        f"add the bias once in {IN_NORM}",
        written("the bias twice", lambda form: replace(form, biases=2)),
    ),
    (
        "norm over the wrong axis",
        f"average over the last axis only in {IN_NORM}",
        written("statistics over the positions", over(-2)),
    ),
    (
        "norm over the wrong axis",
        f"average over the last axis only in {IN_NORM}",
        written("statistics over whole sequences", over(-2, -1)),
    ),
    (
        "heads normalised together instead of each by itself",
        f"average over the H dimensions of each head in {IN_NORM}, after the heads are split",
        over_all_heads,
    ),
)
REPAIRS: tuple[Repair, ...] = tuple(op_repair(cause, advice, ("norm",), maker) for cause, advice, maker in _TABLE)
"""Repairs of norms."""
