"""Repairs of the op that writes new keys and values into the cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from oracle.repairs.ops.black_box import BlackBox, Change, Maker, op_repair
from oracle.repairs.ops.precision import NARROW, without
from oracle.repairs.repair import Repair


def shifted(by: int) -> Maker:
    """Slots shifted: always, of single tokens only, or of longer pieces only."""

    def maker(box: BlackBox) -> Iterator[Change]:
        change = f"with slots {'raised' if by > 0 else 'lowered'} by {abs(by)}"
        yield box.fed(change, lambda new, buffer, slots: (new, buffer, slots + by))
        yield box.fed(
            f"{change} in steps of one token",
            lambda new, buffer, slots: (new, buffer, slots + by * (slots.shape[1] == 1)),
        )
        yield box.fed(
            f"{change} in a prefill", lambda new, buffer, slots: (new, buffer, slots + by * (slots.shape[1] > 1))
        )

    return maker


def nothing(box: BlackBox) -> Iterator[Change]:
    """An op that gives back the buffer it was given: write."""
    if np.array_equal(box.answer, np.asarray(box.site.inputs[1]).astype(box.answer.dtype)):
        yield box.turned("with the new values written", _written)


def _written(y: Any, new: Any, buffer: Any, slots: Any) -> Any:
    for row in range(new.shape[0]):
        for time in range(new.shape[2]):
            y = y.at[row, :, slots[row, time]].set(new[row, :, time], mode="drop")
    return y


_STORE = "each row's new keys and values go into its own slots: store in jaxgpt/ops.py, slots in jaxgpt/model.py"
_DTYPE = "keep keys and values in the compute dtype: empty in jaxgpt/cache.py, store in jaxgpt/ops.py"
REPAIRS: tuple[Repair, ...] = (
    op_repair("cache slot off by one", _STORE, ("store",), shifted(-1)),
    op_repair("cache slot off by one", _STORE, ("store",), shifted(1)),
    op_repair("new keys and values not stored", _STORE, ("store",), nothing),
    *(op_repair("cache dtype too low", _DTYPE, ("store",), without(name)) for name in NARROW),
)
"""Repairs of the store op."""
