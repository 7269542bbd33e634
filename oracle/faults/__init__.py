"""Faults that the oracle is measured on, each planted in memory in a true candidate."""

from oracle.faults.catalogue import CATALOGUE, FAULTS
from oracle.faults.fault import Fault
from oracle.faults.held_out import HELD_OUT

__all__ = ["CATALOGUE", "FAULTS", "HELD_OUT", "Fault"]
