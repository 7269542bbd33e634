"""Which classes of fault a run could have shown, and which not, with the reason.

A pass says nothing about a fault that the weights, the inputs or the rungs could
not have exposed. The classes are those of the fault catalogue, on which the oracle's
detection rate is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxgpt.config import ModelConfig
from oracle import probe, text_reference
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.fault import TEXT, Fault

if TYPE_CHECKING:
    from oracle.comparison import Comparison

NO_SOURCE = "no --reference folder to compare the weights with"
NO_TOKENIZER = "the checkpoint has no tokenizer"
NO_TEMPLATE = "the checkpoint has no template"
REACH: Mapping[str, tuple[Callable[[ModelConfig], bool], str]] = {
    "anything beyond position 512": (lambda config: config.max_position_embeddings > 512, "the context is shorter"),
    "anything near the end of the context": (probe.is_cheap, "decoding to it is left out for large models"),
}
"""What is no class of its own: where in a sequence a fault may lie."""


def classes(comparison: "Comparison", rungs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the exposed classes, and the reason for each hidden one.

    A class is exposed if one of its rows in the catalogue is.

    Args:
        rungs: those that were run.
    """
    text = _text_reasons(comparison)
    reasons: dict[str, list[str]] = {}
    for fault in CATALOGUE:
        reasons.setdefault(fault.name, []).append(_reason(fault, comparison, rungs, text))
    if "operators" in rungs:
        config = comparison.candidate.config
        reasons |= {name: ["" if reached(config) else reason] for name, (reached, reason) in REACH.items()}
    hidden = {name: found[0] for name, found in reasons.items() if all(found)}
    return [name for name in reasons if name not in hidden], hidden


def _reason(fault: Fault, comparison: "Comparison", rungs: Sequence[str], text: Mapping[str, str]) -> str:
    """Why this row could not have shown; empty if it could."""
    config, dtype = comparison.candidate.config, comparison.candidate.dtype
    if fault.rung not in rungs:
        return f"the rung {fault.rung} was not reached"
    if fault.needs == TEXT:
        return text.get("") or text.get(fault.name, "")
    if fault.rung == "bits" and comparison.source is None:
        return NO_SOURCE
    return fault.absent(config, dtype)


# -- Text ------------------------------------------------------------------------------

_TEMPLATE = (
    *("template without separator", "template without line break", "turn not ended", "roles swapped"),
    *("contents stripped", "system message added", "BOS before the template", "mask of everything"),
    *("end token not trained", "chat mask off by one", "last reply only"),
)
_BYTE_LEVEL = ("wrong pre-tokenizer regex", "merges missing", "hex or byte-level vocabulary")


def _text_reasons(comparison: "Comparison") -> dict[str, str]:
    """Why classes of text could not have shown, by name; the empty name stands for all of them."""
    text = comparison.candidate.text
    if text is None:
        return {"": NO_TOKENIZER}
    if not text_reference.references(comparison):
        return {"": text_reference.MISSING}
    strings = text.saved["special_token_ids"]
    begins = any(a != b and a.startswith(b) for a in strings for b in strings)
    reasons = {} if begins else {"prefix-matching special": "no special token begins another"}
    if text.saved["kind"] == "char":
        reasons |= dict.fromkeys(_BYTE_LEVEL, "the tokenizer has no merges")
    if not text.saved_template:
        reasons |= dict.fromkeys(_TEMPLATE, NO_TEMPLATE)
    return reasons
