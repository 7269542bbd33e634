"""A fault of the catalogue in a user's own model: to see what the oracle would say of it."""

import difflib
from collections.abc import Callable, Iterator

from jaxgpt.errors import InputError
from oracle import exposure, text_reference
from oracle.candidate import Candidate
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.fault import TEXT, Fault
from oracle.reports import wording
from oracle.reports.evidence import ASKS
from oracle.text import Text

OFFERED = 5
"""Names that an error proposes."""
ALIKE = 0.6
"""How alike they are at least, as `difflib` measures it."""
LIST = "python -m oracle faults --list"


def planter(name: str) -> Callable[[Candidate], Candidate]:
    """What plants a class of the catalogue, or one row of it by its id, in a model.

    The function raises InputError for a model in which the mistake does not exist or changes nothing.

    Raises:
        InputError: no such class.
    """
    name = known(name)
    rows = [fault for fault in CATALOGUE if name in (fault.name, fault.id)]

    def plant(true: Candidate) -> Candidate:
        reasons = [_reason(fault, true) for fault in rows]
        if all(reasons):
            raise InputError(f"--plant: {name} cannot be planted in this model: {reasons[0]}; choose another class")
        return rows[reasons.index("")].plant(true)

    return plant


def known(name: str) -> str:
    """The name of a class, or the id of a row, as the catalogue spells it: blanks and case do not matter.

    Raises:
        InputError: no such class.
    """
    spelled = {_key(each): each for fault in CATALOGUE for each in (fault.id, fault.name)}
    if _key(name) in spelled:
        return spelled[_key(name)]
    classes = [_key(fault.name) for fault in CATALOGUE]
    near = difflib.get_close_matches(_key(name), dict.fromkeys(classes), OFFERED, cutoff=ALIKE)
    offered = f"near it: {', '.join(wording.quoted([spelled[key] for key in near]))}; " if near else ""
    raise InputError(f"--plant: the catalogue has no class {name!r}; {offered}`{LIST}` names them all")


def listed() -> Iterator[str]:
    """Every class and what it does, by the rung in which it must show."""
    for rung in dict.fromkeys(sorted((fault.rung for fault in CATALOGUE), key=list(ASKS).index)):
        yield f"{rung}: {ASKS[rung]}"
        causes: dict[str, list[str]] = {}
        for fault in CATALOGUE:
            if fault.rung == rung:
                causes.setdefault(fault.name, []).append(fault.cause)
        for name, found in causes.items():
            yield f"  {name}: {'; or '.join(dict.fromkeys(found))}"
        yield ""


def _key(name: str) -> str:
    return " ".join(name.split()).casefold()


def _reason(fault: Fault, true: Candidate) -> str:
    """Why a row cannot be planted; empty where it can."""
    if fault.needs == TEXT:
        return _unseen(fault, true.text)
    absent = fault.absent(true.config, true.dtype)
    return f"it {absent}" if absent.startswith("exists") else absent


def _unseen(fault: Fault, text: Text | None) -> str:
    """Why a mistake of the text side cannot show."""
    if text is None:
        return "it has no tokenizer"
    if text.saved["kind"] != "char" and not text_reference.is_installed():
        return text_reference.MISSING
    return exposure.text_reasons(text).get(fault.name, "")
