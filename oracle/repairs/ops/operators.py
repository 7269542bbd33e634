"""Repairs of single ops, measured on the reference's own inputs."""

from oracle.repairs.ops import anywhere, attention, linear, masks, mlp, norms, precision, rope, storage
from oracle.repairs.repair import Repair

REPAIRS: tuple[Repair, ...] = (
    *linear.REPAIRS,
    *norms.REPAIRS,
    *rope.REPAIRS,
    *attention.REPAIRS,
    *masks.REPAIRS,
    *mlp.REPAIRS,
    *storage.REPAIRS,
    *anywhere.REPAIRS,
    *precision.REPAIRS,
)
"""By the kind of op; narrow ones first."""
