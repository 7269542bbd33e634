"""The fault catalogue: every class of mistake that the oracle is measured on."""

from dataclasses import replace

from oracle.faults.fault import Fault
from oracle.faults.names import NAMES
from oracle.faults.tables.attention import ATTENTION
from oracle.faults.tables.ops import OPERATORS
from oracle.faults.tables.text import TEXT
from oracle.faults.tables.training import TRAINING
from oracle.faults.tables.weights import WEIGHTS
from oracle.faults.tables.wiring import DECODING, WIRING

KINDS: dict[str, tuple[Fault, ...]] = {
    "weights": WEIGHTS,
    "ops": (*OPERATORS, *ATTENTION),
    "wiring": WIRING,
    "decoding": DECODING,
    "training": TRAINING,
    "text": TEXT,
}
CATALOGUE: tuple[Fault, ...] = tuple(
    replace(fault, names=fault.names | frozenset(NAMES.get(fault.cause, ())))
    for rows in KINDS.values()
    for fault in rows
)
"""One row a class and place."""


def named(id: str) -> Fault:
    """The row of an id."""
    return next(fault for fault in CATALOGUE if fault.id == id)


FAULTS: tuple[Fault, ...] = tuple(
    named(id)
    for id in ("kernel transposed", "bf16 bits read as fp16", "RoPE interleaved", "norm epsilon", "cache offset")
)
"""One of each kind, for a quick look at whether the oracle finds anything at all."""
