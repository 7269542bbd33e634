"""Repairs that fit ops of every kind: a sign, a constant factor, one row's inputs used for all rows."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, nice, op_repair
from oracle.repairs.repair import Repair


def negated(box: BlackBox) -> Iterator[Change]:
    """The output with the other sign."""
    if box.answer.dtype != np.bool_ and box.site.op.function not in ("angles", "mask"):
        yield box.turned("with its output's sign changed", lambda y, *_: -y)


def multiplied(box: BlackBox) -> Iterator[Change]:
    """The constant by which the output is too large."""
    true, ours = box.site.truth.astype(np.float64), box.answer.astype(np.float64)
    norm = float(np.square(true).sum())
    if box.site.truth.dtype == np.bool_ or ours.shape != true.shape or not norm or box.site.op.function == "mask":
        return
    factor = float((ours * true).sum()) / norm
    left = float(np.square(ours - factor * true).sum()) ** 0.5
    # Only a multiple is taken for one: what is left is rounding.
    if np.isfinite(factor) and factor not in (0.0, 1.0) and left <= 16 * box.epsilon * abs(factor) * norm**0.5:
        known = [sign * value for value in box.facts.constants for sign in (1, -1)]
        # Roundings average out: the factor is known better than any one number.
        rounding = left / (abs(factor) * norm**0.5 * ours.size**0.5)
        factor = nice(factor, 4 * max(2.0**-23, rounding), known)
        yield box.scaled(f"with its output divided by {factor:.6g}", 1 / factor)


def first_row(box: BlackBox) -> Iterator[Change]:
    """An op whose answer does not change when every row gets the first row's values of one input."""
    batch = np.shape(box.site.inputs[0])[0]
    for number, given in enumerate(map(np.asarray, box.site.inputs)):
        if given.ndim < 2 or given.shape[0] != batch or not (given != given[:1]).any():
            continue
        inputs = list(box.site.inputs)
        inputs[number] = np.broadcast_to(given[:1], given.shape)
        if np.array_equal(box.given(inputs), box.answer):
            yield "with each row of the batch alone", _row_by_row(box, batch)
            return


def _row_by_row(box: BlackBox, batch: int) -> Any:
    def repaired(config: ModelConfig, p: Leaves, *x: Any) -> Any:
        def row(b: int) -> list[Any]:
            return [each[b : b + 1] if each.ndim > 1 and each.shape[0] == batch else each for each in x]

        return jnp.concatenate([box.function(config, p, *row(b)) for b in range(batch)])

    return repaired


REPAIRS: tuple[Repair, ...] = (
    op_repair("output has the wrong sign", "look for a minus in the op (jaxgpt/ops.py)", (), negated),
    op_repair(
        "first row's values used for the whole batch",
        "index by row in the op (jaxgpt/ops.py)",
        ("angles", "attention_mask", "embed", "rope", "mask", "store"),
        first_row,
    ),
    op_repair(
        "output multiplied by a constant",
        "look for a factor in the op (jaxgpt/ops.py)",
        (),
        multiplied,
        last_resort=True,
    ),
)
"""Repairs of ops of any kind."""
