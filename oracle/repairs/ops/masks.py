"""Repairs of who may attend to whom: the mask, its application, and the softmax behind it."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import MASKED, Leaves
from oracle.compare import HIDDEN
from oracle.repairs.ops.black_box import BlackBox, Change, Maker, op_repair, wide
from oracle.repairs.repair import Repair

Pattern = Callable[[Any, Any, float], Any]
"""(how long ago, same document, width of the window) to a wrong mask, all (B, 1, T, S); see `_times` for the first."""


def _times(slots: Any, key_slots: Any) -> Any:
    """How many slots each key lies before its query, (B, 1, T, S)."""
    return slots[:, None, :, None] - key_slots


PATTERNS: dict[str, dict[str, Pattern]] = {
    "causal mask off by one": {
        "with the token itself visible": lambda ago, same, width: (ago > 0) & (ago < width) & same,
        "with the next token hidden": lambda ago, same, width: (ago >= -1) & (ago < width) & same,
    },
    "no causal mask": {"with later tokens hidden": lambda ago, same, width: (ago < width) & same},
    "documents not separated": {"with other documents hidden": lambda ago, same, width: (ago >= 0) & (ago < width)},
    "sliding window ignored": {
        "with tokens before the window hidden": lambda ago, same, width: (ago >= 0) & same,
    },
    "no attention mask at all": {
        "with later tokens and other documents hidden": lambda ago, same, width: jnp.full(same.shape, True)
    },
    "attention mask transposed": {
        "with earlier instead of later tokens": lambda ago, same, width: (ago <= 0) & (-ago < width) & same
    },
    "attention mask inverted": {
        "with the mask inverted": lambda ago, same, width: ~((ago >= 0) & (ago < width) & same)
    },
}
"""Wrong masks by cause and by the change that undoes them."""


def _right(ago: Any, same: Any, width: float) -> Any:
    return (ago >= 0) & (ago < width) & same


def _width(box: BlackBox) -> float:
    """Of the reference's window; infinite where it has none."""
    return box.facts.window or np.inf


def entries(named: dict[str, Pattern]) -> Maker:
    """The mask with the entries turned in which the right one and a wrong one differ."""

    def maker(box: BlackBox) -> Iterator[Change]:
        for change, pattern in named.items():
            yield box.turned(change, _turned(pattern, _width(box)))

    return maker


def _turned(pattern: Pattern, width: float) -> Callable[..., Any]:
    def output(y: Any, slots: Any, key_slots: Any, segments: Any, key_segments: Any) -> Any:
        ago = _times(slots, key_slots)
        # A cached forward has one document a row and no segments.
        same = (
            jnp.full(ago.shape, True) if segments is None else segments[:, None, :, None] == key_segments[:, None, None]
        )
        return y ^ _right(ago, same, width) ^ pattern(ago, same, width)

    return output


def window(box: BlackBox) -> Iterator[Change]:
    """A mask that hides what is further back than the furthest that its answer shows."""
    slots, key_slots, segments, key_segments = map(np.asarray, box.site.inputs)
    ago, same = _times(slots, key_slots), segments[:, None, :, None] == key_segments[:, None, None]
    right = _right(ago, same, _width(box))
    if box.answer.shape != right.shape or not box.answer.any():
        return
    width = int(ago[box.answer].max()) + 1
    if box.facts.window is None and width <= int(ago[right].max()):
        change = f"without a window of {width} tokens"
        yield from entries({change: lambda ago, same, _: _right(ago, same, width)})(box)


def other_window(box: BlackBox) -> Iterator[Change]:
    """A window of another width than the model's: that of the furthest token that its answer shows."""
    slots, key_slots, *_ = map(np.asarray, box.site.inputs)
    ago, wanted = _times(slots, key_slots), box.facts.window
    if wanted is None or box.answer.shape != ago.shape or not box.answer.any():
        return
    yield from box.configured(f"with a window of {wanted} tokens in the config", sliding_window=wanted)
    width = int(ago[box.answer].max()) + 1
    if width != wanted and width <= int(ago.max()):
        change = f"with a window of {wanted} tokens instead of {width}"
        yield from entries({change: lambda ago, same, _: _right(ago, same, width)})(box)


# -- Application to the scores ---------------------------------------------------------


def applied(named: dict[str, Pattern]) -> Maker:
    """Scores masked by a wrong pattern instead of the mask, with those entries put right in which the two differ."""

    def maker(box: BlackBox) -> Iterator[Change]:
        scores, right = map(np.asarray, box.site.inputs)
        segments = box.site.comparison.sequences().segments
        counted = np.arange(scores.shape[-1])
        ago = _times(np.broadcast_to(counted, segments.shape), counted)
        same = segments[:, None, :, None] == segments[:, None, None]
        for change, pattern in named.items():
            wrong = np.broadcast_to(np.asarray(pattern(ago, same, _width(box))), right.shape)
            if _is_masked_by(box, scores, wrong):
                yield change, _put_right(box, wrong)

    return maker


def _is_masked_by(box: BlackBox, scores: np.ndarray, pattern: np.ndarray) -> bool:
    visible = np.broadcast_to(pattern, scores.shape)
    if box.answer.shape != scores.shape or not np.array_equal(box.answer > HIDDEN, visible):
        return False
    return bool(np.array_equal(box.answer[visible], np.asarray(scores)[visible]))


def _put_right(box: BlackBox, wrong: np.ndarray) -> Any:
    def output(y: Any, scores: Any, allowed: Any) -> Any:
        if scores.shape[2:] != wrong.shape[2:]:
            return y
        return jnp.where(allowed == wrong, y, jnp.where(allowed, scores, MASKED))

    return box.turned("", output)[1]


def value(box: BlackBox) -> Iterator[Change]:
    """Hidden scores that are one and the same finite number, or a number below what they were."""
    scores, allowed = (np.asarray(given) for given in box.site.inputs)
    hidden = np.broadcast_to(~allowed, scores.shape)
    if box.answer.shape != scores.shape or not hidden.any():
        return
    found, before = box.answer[hidden].astype(np.float64), scores[hidden].astype(np.float64)
    for used, given in ((found, "written over"), (found - before, "added to")):
        number = float(np.median(used))
        if number < 0 and number > HIDDEN and np.allclose(used, number, rtol=1e-4):
            change = f"with {MASKED:.3g} in place of {number:.6g} {given} hidden scores"
            yield box.turned(change, lambda y, _, allowed: jnp.where(allowed, y, MASKED))
            return


def by(wrong: Callable[[Any, Any], Any]) -> Maker:
    """Scores from which the mask makes what `wrong(scores, allowed)` says, of each and every one."""

    def output(y: Any, scores: Any, allowed: Any) -> Any:
        return jnp.where(y == wrong(scores, allowed), jnp.where(allowed, scores, MASKED), y)

    def maker(box: BlackBox) -> Iterator[Change]:
        scores, allowed = map(np.asarray, box.site.inputs)
        if np.array_equal(box.answer, wrong(scores, allowed)):
            yield box.turned(f"with {MASKED:.3g} where the mask says no, and the scores as they are elsewhere", output)

    return maker


# -- Softmax ---------------------------------------------------------------------------


def _softmax(p: Any, x: Any) -> Any:
    y = _exponentials(x)
    return y / y.sum(-1, keepdims=True)


def _one_more(p: Any, x: Any) -> Any:
    y = _exponentials(x)
    return y / (y.sum(-1, keepdims=True) + jnp.exp(-x.max(-1, keepdims=True)))


def _exponentials(x: Any) -> Any:
    return jnp.exp(x - x.max(-1, keepdims=True))


def other_axis(box: BlackBox) -> Iterator[Change]:
    """Along the queries, or the heads: give it the keys there."""
    for axis, named in ((2, "queries"), (1, "heads")):

        def repaired(config: ModelConfig, p: Leaves, x: Any, axis: int = axis) -> Any:
            return box.function(config, p, x.swapaxes(axis, -1)).swapaxes(axis, -1)

        yield f"with keys and {named} exchanged before and after", repaired


def one_more(box: BlackBox) -> Iterator[Change]:
    """exp(x) / (1 + sum exp(x))."""
    yield box.less(_one_more, _softmax, "1 + sum in the denominator", "the sum")


def not_normalised(box: BlackBox) -> Iterator[Change]:
    """Rows that are exponentials, of scores or of scores less their maximum."""
    if box.answer.ndim and np.allclose(box.answer.max(-1), 1, rtol=4 * box.epsilon):
        yield box.turned("with each row divided by its sum", lambda y, _: wide(y) / wide(y).sum(-1, keepdims=True))


def base_two(box: BlackBox) -> Iterator[Change]:
    """2^x / sum 2^x is the softmax of x log 2: give it x / log 2."""
    factor = np.float32(1 / np.log(2))
    yield box.fed("with scores divided by log 2", lambda x: (jnp.maximum(x * factor, MASKED),))


def overflowing(box: BlackBox) -> Iterator[Change]:
    """An op whose exponentials are beyond the largest number: give it scores less their row's maximum."""
    sums = box.answer.sum(-1)
    # An infinite sum gives NaN, or zeros where no single number was infinite.
    if not np.isfinite(sums).all() or (sums == 0).any():
        change = "with each row's maximum subtracted"
        yield box.fed(change, lambda x: (jnp.maximum(x - x.max(-1, keepdims=True), MASKED),))


def scale_again(box: BlackBox) -> Iterator[Change]:
    """Scores scaled by H to ±1/2 once more before the softmax."""
    root = box.facts.head_dim**0.5
    yield box.fed("with scores multiplied by √H", lambda x: (jnp.maximum(x * np.float32(root), MASKED),))


def scale_undone(box: BlackBox) -> Iterator[Change]:
    """The reverse."""
    yield box.fed("with scores divided by √H", lambda x: (x / np.float32(box.facts.head_dim**0.5),))


_MASK = "a token may attend to itself and to earlier tokens of its document: attention_mask in jaxgpt/ops.py"
_WINDOW = "a token may attend to sliding_window tokens, itself included: the config and attention_mask in jaxgpt/ops.py"
_APPLY = "the mask op in jaxgpt/ops.py writes float32's minimum wherever the mask says no"
_SOFTMAX = "the softmax op in jaxgpt/ops.py is a plain softmax over the last axis"
REPAIRS: tuple[Repair, ...] = (
    *(op_repair(cause, _MASK, ("attention_mask",), entries(named)) for cause, named in PATTERNS.items()),
    op_repair("sliding window", _MASK, ("attention_mask",), window),
    op_repair("sliding window of another width", _WINDOW, ("attention_mask",), other_window),
    op_repair("mask value too small", _APPLY, ("mask",), value),
    op_repair("mask multiplied into the scores", _APPLY, ("mask",), by(lambda scores, allowed: scores * allowed)),
    op_repair("mask added to the scores as 0 and 1", _APPLY, ("mask",), by(lambda scores, allowed: scores + allowed)),
    *(op_repair(cause, _APPLY, ("mask",), applied(named)) for cause, named in PATTERNS.items()),
    op_repair("softmax over the wrong axis", _SOFTMAX, ("softmax",), other_axis),
    op_repair("softmax with one more in its denominator", _SOFTMAX, ("softmax",), one_more),
    op_repair("softmax not normalised", _SOFTMAX, ("softmax",), not_normalised),
    op_repair("softmax in base 2 instead of e", _SOFTMAX, ("softmax",), base_two),
    op_repair(
        "softmax without its maximum subtracted",
        "subtract each row's maximum before exp: the softmax op in jaxgpt/ops.py",
        ("softmax",),
        overflowing,
    ),
    op_repair("attention scale applied twice", _SOFTMAX, ("softmax",), scale_again),
    op_repair("attention scale missing", _SOFTMAX, ("softmax",), scale_undone),
)
"""Repairs of masks and the softmax."""
