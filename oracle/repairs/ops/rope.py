"""Repairs of rotary positions: the angles, and the rotation by them."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, nice, op_repair, wide
from oracle.repairs.repair import Repair
from torchref import llama
from torchref.config import Rope
from torchref.llama import frequencies

SMALLEST, LARGEST = 1.001, 1e12
"""No base is smaller or larger."""

# -- Angles ----------------------------------------------------------------------------


def proper(box: BlackBox) -> np.ndarray:
    """The reference's radians per position, (H / 2,) in float64."""
    assert box.facts.rope is not None
    return frequencies(box.facts.rope, box.facts.head_dim).numpy()


def _other(box: BlackBox, **fields: Any) -> np.ndarray:
    rope = Rope(**{**vars(box.facts.rope), **fields})
    return frequencies(rope, box.facts.head_dim).numpy()


def _divided(box: BlackBox, change: str, wrong: np.ndarray) -> Change:
    """An op that gives position times `wrong`: each pair's angle multiplied by what is right over what is wrong."""
    ratio = jnp.asarray(proper(box) / wrong, jnp.float32)
    return box.turned(change, lambda y, *_: y * ratio)


def theta(box: BlackBox) -> Iterator[Change]:
    """The base that the angles imply, in place of the right one; with no scaling, where both were left behind."""
    rope = box.facts.rope
    assert rope is not None
    yield from box.configured(f"with theta {rope.theta:g} in the config", rope_theta=rope.theta)
    used = _theta_in_use(box)
    if used is not None and abs(used - rope.theta) > 1e-5 * rope.theta:
        yield _divided(box, f"with theta {rope.theta:g} instead of {used:g}", _other(box, theta=used))
    plain = _theta_in_use(box, kind="default") if rope.kind != "default" else None
    if plain is not None and abs(plain - rope.theta) > 1e-5 * rope.theta:
        words = (
            f"with theta {rope.theta:g} and {rope.kind} scaling instead of {float(f'{plain:.4g}'):g} without scaling"
        )
        yield _divided(box, words, _other(box, theta=plain, kind="default"))


def _theta_in_use(box: BlackBox, **fields: Any) -> float | None:
    """Found by halving: the larger the base, the slower the last pair, however frequencies are scaled."""
    half = box.facts.head_dim // 2
    angle = box.given([np.ones((1, 1), np.int32)]).astype(np.float64).ravel()
    if angle.shape != (half,) or half < 2 or not (angle > 0).all():
        return None
    low, high = np.log(SMALLEST), np.log(LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        slower = _other(box, theta=float(np.exp(middle)), **fields)[-1] < angle[-1]
        low, high = (low, middle) if slower else (middle, high)
    # One digit of the angle, half / (half - 1) times.
    return nice(float(np.exp(low)), 8e-7) if np.log(SMALLEST) < low < np.log(LARGEST) * 0.999 else None


def unscaled(box: BlackBox) -> Iterator[Change]:
    """Scaling that the op leaves out."""
    rope = box.facts.rope
    assert rope is not None
    if rope.kind != "default":
        if box.site.candidate.config.rope_scaling is None:
            yield from box.configured(f"with {rope.kind} scaling in the config", rope_scaling=_scaling(rope))
        yield _divided(box, f"with {rope.kind} scaling", _other(box, kind="default"))


def _scaling(rope: Rope) -> RopeScaling:
    assert rope.kind in ("linear", "llama3", "yarn")
    if rope.kind == "linear":
        return RopeScaling("linear", rope.factor)
    if rope.kind == "yarn":
        said = {field.name: getattr(rope, field.name) for field in fields(RopeScaling) if hasattr(rope, field.name)}
        return RopeScaling.from_dict({**said, "rope_type": "yarn", "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    spread = rope.low_freq_factor, rope.high_freq_factor
    return RopeScaling("llama3", rope.factor, *spread, rope.original_max_position_embeddings)


LLAMA3 = tuple(
    Rope(1.0, "llama3", factor, 1.0, 4.0, context) for factor in (8.0, 32.0) for context in (8192, 4096, 2048, 32)
)
"""Scalings that somebody may have left switched on."""


def not_wanted(box: BlackBox) -> Iterator[Change]:
    """Scaling that the model has not, or another kind or factor than it has."""
    rope, has = box.facts.rope, box.site.candidate.config.rope_scaling
    assert rope is not None
    if rope.kind == "default" and has is not None:
        yield from box.configured("without scaling in the config", rope_scaling=None)
    if rope.kind != "default" and has is not None:
        yield from box.configured(f"with the reference's {rope.kind} scaling", rope_scaling=_scaling(rope))
    slower = _common_factor(box)
    if slower is not None and not (rope.kind == "linear" and slower == 1 / rope.factor):
        yield box.turned(f"with the angles multiplied by {slower:g}", lambda y, *_: y * np.float32(slower))
    for scaling in LLAMA3:
        wrong = _other(box, **{**vars(scaling), "theta": rope.theta})
        # Of short waves it changes none.
        if not any(np.allclose(wrong, other, rtol=1e-5) for other in (proper(box), _other(box, kind="default"))):
            yield _divided(box, f"without llama3 scaling by {scaling.factor:g}", wrong)


def other_kind(box: BlackBox) -> Iterator[Change]:
    """The factor of the model's scaling in a scaling of the other kind."""
    rope, context = box.facts.rope, box.site.candidate.config.max_position_embeddings
    assert rope is not None
    if rope.kind in ("llama3", "yarn"):
        yield _divided(box, f"with {rope.kind} scaling instead of linear", _other(box, kind="linear"))
    if rope.kind == "yarn":
        yield from _other_ramp(box, rope, context)
    if rope.kind == "linear":
        for original in dict.fromkeys((*(scaling.original_max_position_embeddings for scaling in LLAMA3), context)):
            wrong = Rope(rope.theta, "llama3", rope.factor, 1.0, 4.0, original)
            yield _divided(box, "with linear scaling instead of llama3", _other(box, **vars(wrong)))


def _other_ramp(box: BlackBox, rope: Rope, context: int) -> Iterator[Change]:
    """yarn between other pairs: the new context taken for the old one, or ends rounded or not."""
    old, truncates = rope.original_max_position_embeddings, rope.truncate
    ramps = {
        f"with the old context of {old}, not {context}": {"original_max_position_embeddings": context},
        f"with the ends of the ramp {'rounded' if truncates else 'not rounded'}": {"truncate": not truncates},
    }
    for change, changed in ramps.items():
        wrong = _other(box, **changed)
        if not np.allclose(wrong, proper(box), rtol=1e-6):
            yield _divided(box, change, wrong)


def other_width(box: BlackBox) -> Iterator[Change]:
    """Exponents 2i / D instead of 2i / H."""
    rope, f = box.facts.rope, box.facts
    assert rope is not None
    if f.width != f.head_dim:
        wrong = _other(box, theta=rope.theta ** (f.head_dim / f.width))
        yield _divided(box, f"with exponents divided by H = {f.head_dim}, not by D = {f.width}", wrong)


def multiplied_positions(box: BlackBox) -> Iterator[Change]:
    """Positions times a whole number."""
    rope, slower = box.facts.rope, _common_factor(box)
    assert rope is not None
    times = round(1 / slower) if slower else 0
    if slower and times > 1 and abs(times * slower - 1) < 1e-5 and not (rope.kind == "linear" and times == rope.factor):
        yield box.turned(f"with positions divided by {times}", lambda y, *_: y / np.float32(times))


def _common_factor(box: BlackBox) -> float | None:
    """By which every pair is too slow."""
    angle = box.given([np.ones((1, 1), np.int32)]).astype(np.float64).ravel()
    right = proper(box)
    if angle.shape != right.shape or not (angle > 0).all():
        return None
    ratios = right / angle
    factor = nice(float(np.median(ratios)), 1e-6)
    even = np.allclose(ratios, factor, rtol=1e-6, atol=0)
    return factor if even and abs(factor - 1) > 1e-4 else None


# -- Rotation --------------------------------------------------------------------------


def stretch(box: BlackBox) -> float:
    """By how much the reference's rotation lengthens: 1 but for yarn."""
    return llama.stretch(box.facts.rope) if box.facts.rope else 1.0


def rotated(x: Any, angles: Any, times: float = 1.0) -> Any:
    """x (B, N, T, H) turned by angles (B, T, H / 2): the pairs (i, i + H / 2) as complex numbers."""
    first, second = jnp.split(wide(x), 2, axis=-1)
    cos, sin = (np.float32(times) * function(angles)[:, None] for function in (jnp.cos, jnp.sin))
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def half_split(box: BlackBox) -> Iterator[Change]:
    """Give an op that turns the pairs (2i, 2i + 1) the pairs (i, i + H/2) in that order, and put its answer back."""

    def repaired(config: ModelConfig, p: Leaves, x: Any, angles: Any) -> Any:
        first, second = jnp.split(x, 2, axis=-1)
        turned = box.function(config, p, jnp.stack([first, second], axis=-1).reshape(x.shape), angles)
        return jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1)

    yield "with half-split pairs", repaired


def reversed_direction(box: BlackBox) -> Iterator[Change]:
    """The other way round."""
    if box.site.op.function == "angles":
        yield box.turned("with the angles' sign changed", lambda y, *_: -y)
    else:
        yield box.fed("with the angles' sign changed", lambda x, angles: (x, -angles))


def exchanged(box: BlackBox) -> Iterator[Change]:
    """x1 sin - x2 cos and x2 sin + x1 cos, for x2 and x1, are the right halves, the first with the other sign."""

    def repaired(config: ModelConfig, p: Leaves, x: Any, angles: Any) -> Any:
        swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
        first, second = jnp.split(box.function(config, p, swapped, angles), 2, axis=-1)
        return jnp.concatenate([-first, second], axis=-1)

    yield "with sine and cosine exchanged back", repaired


def missing(box: BlackBox) -> Iterator[Change]:
    """Rotate an output that is not."""
    yield box.turned("with its output rotated", lambda y, x, angles: rotated(y, angles, stretch(box)))


def twice(box: BlackBox) -> Iterator[Change]:
    """Rotate an output back."""
    yield box.turned("with its output rotated back once", lambda y, x, angles: rotated(y, -angles, 1 / stretch(box)))


def unstretched(box: BlackBox) -> Iterator[Change]:
    """yarn's attention factor left out, or taken twice."""
    factor = stretch(box)
    if factor != 1:
        yield box.scaled(f"with its output multiplied by yarn's attention factor {factor:.6g}", factor)
        yield box.scaled(f"with its output divided by yarn's attention factor {factor:.6g} once", 1 / factor)


def shifted(by: int) -> Callable[[BlackBox], Iterator[Change]]:
    """Positions shifted, as angles."""

    def maker(box: BlackBox) -> Iterator[Change]:
        step = jnp.asarray(by * proper(box), jnp.float32)
        change = f"with angles one position {'later' if by > 0 else 'earlier'}"
        yield box.fed(change, lambda x, angles: (x, angles + step))

    return maker


def partial_head(box: BlackBox) -> Iterator[Change]:
    """Rotation of the head's first R dimensions only; R is where the answer begins to equal the input."""
    x = np.asarray(box.site.inputs[0]).astype(np.float32)
    if box.answer.shape != x.shape:
        return
    half = x.shape[-1] // 2
    same = (box.answer == x).all(axis=(0, 1, 2))
    alone = int(np.argmin(same[::-1]))  # dimensions at the end that stay
    if 0 < alone < x.shape[-1] and not alone % 2:
        width = x.shape[-1] - alone
        for named, angles in ((f"the first {width} dimensions", _first), (f"{width} as a head of its own", _own(box))):
            part = _part(width, angles, stretch(box))
            yield box.less(part, lambda p, x, a: rotated(x, a, stretch(box)), named, "whole heads rotated")
    pairs = int(np.argmin((same[:half] & same[half:])[::-1]))
    if 0 < pairs < half:
        turned = half - pairs
        still = jnp.arange(half) >= turned
        yield box.turned(
            f"with the last {pairs} pairs rotated too", lambda y, x, angles: rotated(y, jnp.where(still, angles, 0.0))
        )


def _part(width: int, angles: Callable[[Any, int], Any], times: float) -> Callable[..., Any]:
    return lambda p, x, given: jnp.concatenate(
        [rotated(x[..., :width], angles(given, width // 2), times), x[..., width:]], axis=-1
    )


def _first(angles: Any, pairs: int) -> Any:
    return angles[..., :pairs]


def _own(box: BlackBox) -> Callable[[Any, int], Any]:
    # From pair to pair the frequency falls by the same factor, further in a narrower head.
    half, turns = box.facts.head_dim // 2, proper(box)

    def angles(given: Any, pairs: int) -> Any:
        falls = (turns[1] / turns[0]) ** (np.arange(pairs) * half / pairs)
        return given[..., :1] * jnp.asarray(falls, jnp.float32)

    return angles


_ROPE = "the rope op in jaxgpt/ops.py rotates the pairs (i, i + H/2) of whole heads by position times frequency"
_DIRECTION = "the rope op in jaxgpt/ops.py must give (x·cos − y·sin, y·cos + x·sin) of the halves x, y; mind the signs"
_ANGLES = "check rope_theta and rope_scaling in the config (jaxgpt/config.py) and rope_frequencies in jaxgpt/ops.py"
_POSITIONS = "check the positions that are given to the op: uncached_inputs and cached_inputs in jaxgpt/model.py"
REPAIRS: tuple[Repair, ...] = (
    op_repair(
        "RoPE pairs interleaved instead of half-split",
        "rotate the pairs (i, i + H/2) in the rope op (jaxgpt/ops.py), or permute q and k where they are imported",
        ("rope",),
        half_split,
    ),
    op_repair("RoPE direction reversed", _DIRECTION, ("rope", "angles"), reversed_direction),
    op_repair("RoPE sine and cosine exchanged", _ROPE, ("rope",), exchanged),
    op_repair(
        "yarn's attention factor missing or applied twice",
        "cosines and sines are multiplied by RopeScaling.magnitude once: the rope op in jaxgpt/ops.py",
        ("rope",),
        unstretched,
    ),
    op_repair("RoPE missing", _ROPE, ("rope",), missing),
    op_repair("RoPE applied twice", _ROPE, ("rope",), twice),
    op_repair("RoPE on part of the head only", _ROPE, ("rope",), partial_head),
    op_repair("position ids off by one", _POSITIONS, ("rope",), shifted(-1)),
    op_repair("position ids off by one", _POSITIONS, ("rope",), shifted(1)),
    op_repair("rope scaling ignored", _ANGLES, ("angles",), unscaled),
    op_repair("RoPE exponents divided by another width", _ANGLES, ("angles",), other_width),
    op_repair("wrong rope theta", _ANGLES, ("angles",), theta),
    op_repair("positions multiplied by a constant", _POSITIONS, ("angles",), multiplied_positions),
    op_repair("wrong rope scaling", _ANGLES, ("angles",), not_wanted),
    op_repair("wrong rope scaling", _ANGLES, ("angles",), other_kind),
)
"""Repairs of rotary positions."""
