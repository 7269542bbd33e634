"""Every repair, narrow ones first: of two that undo a difference alike, the first is named and the other a tie."""

from oracle.repairs import operators, parameters
from oracle.repairs.repair import Repair

REPAIRS: tuple[Repair, ...] = (*parameters.REPAIRS, *operators.REPAIRS)
