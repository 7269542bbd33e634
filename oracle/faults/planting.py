"""A fault of the catalogue in a user's own model: to see what the oracle would say of it."""

import difflib
from collections.abc import Callable

from jaxgpt.errors import InputError
from oracle.candidate import Candidate
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.fault import TEXT, Fault

OFFERED = 5
"""Names that an error proposes."""


def planter(name: str) -> Callable[[Candidate], Candidate]:
    """What plants a class of the catalogue, or one row of it by its id, in a model.

    The function raises InputError for a model in which the mistake does not exist or changes nothing.

    Raises:
        InputError: no such class.
    """
    rows = [fault for fault in CATALOGUE if name in (fault.name, fault.id)]
    if not rows:
        known = [*dict.fromkeys(fault.name for fault in CATALOGUE)]
        near = difflib.get_close_matches(name, known, OFFERED, cutoff=0.3) or known[:OFFERED]
        raise InputError(f"--plant: the catalogue has no class {name!r}; near it: {', '.join(near)}")

    def plant(true: Candidate) -> Candidate:
        reasons = [_reason(fault, true) for fault in rows]
        if all(reasons):
            raise InputError(f"--plant: {name} cannot be planted in this model: {reasons[0]}; choose another class")
        return rows[reasons.index("")].plant(true)

    return plant


def _reason(fault: Fault, true: Candidate) -> str:
    """Why a row cannot be planted; empty where it can."""
    if fault.needs == TEXT and true.text is None:
        return "it has no tokenizer"
    absent = fault.absent(true.config, true.dtype)
    return f"it {absent}" if absent.startswith("exists") else absent
