"""Faults that stand in no list and for which nobody writes a repair.

They measure what the oracle does with what it has never seen: it must say where it
begins and call it unknown. A name that is not true of it is confidently wrong.
"""

from oracle.faults.held_out.table import HELD_OUT

__all__ = ["HELD_OUT"]
