"""Which classes of fault a run could have shown, and which not, with the reason.

A pass says nothing about a fault that the weights, the inputs or the rungs could
not have exposed. The classes are those of the fault catalogue, on which the oracle's
detection rate is measured.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxgpt import config
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from oracle import jinja_reference, probe, text_reference
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.fault import TEXT, Fault
from oracle.results import NOT_REACHED, Report
from oracle.rungs import ids
from oracle.text import Text

if TYPE_CHECKING:
    from oracle.comparison import Comparison

ABSENT = "exists only"
"""Reasons that begin so are the model's, not the run's."""
NO_SOURCE = "no --reference folder to compare the weights with"
NO_TOKENIZER = "the checkpoint has no tokenizer"
NO_TEMPLATE = "the checkpoint has no template"
NO_SOURCE_TEXT = "no --reference folder to compare the tokenizer's rule with"
UNSEEN_CONTENTS = "the template's output does not show which of it are the contents"
UNPROVED = "the mask of this template cannot be proved, and training refuses it"
PACKAGED = ("char", "gpt2")
"""Kinds of vocabulary whose rule is known without the folder that the weights came from."""
NEVER_RIGHT = frozenset(
    ("bf16 bits read as fp16", "bytes in another order", "one NaN", "tensor never filled", "tensor of another layer")
)
"""Classes of wrong parameters that the rung statistics knows by their values alone."""
FAR = 512
"""Faults of far positions lie beyond it."""


def classes(
    comparison: "Comparison", rungs: Sequence[str], *, export_differs: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Names of the exposed classes, and the reason for each hidden one.

    A class is exposed if one of its rows in the catalogue is.

    Args:
        rungs: those that were run.
        export_differs: a parameter was found that is not as the candidate's own export has it.
    """
    text, configs = _text_reasons(comparison), _configs(comparison)
    reasons: dict[str, list[str]] = {}
    for fault in CATALOGUE:
        reason = _not_run(fault, rungs) or _not_compared(fault, comparison, rungs, text, export_differs)
        if not reason and fault.needs != TEXT:
            absent = [fault.absent(each, comparison.candidate.dtype) for each in configs]
            reason = absent[0] if all(absent) else ""
        reasons.setdefault(fault.name, []).append(reason)
    hidden = {name: found[0] for name, found in reasons.items() if all(found)}
    return [name for name in reasons if name not in hidden], hidden


def beyond(comparison: "Comparison", rungs: Sequence[str]) -> dict[str, str]:
    """Places in a sequence of which nothing is said, each with the reason."""
    ours, unreached = comparison.candidate.config, dict[str, str]()
    if "operators" not in rungs:
        return unreached
    if ours.max_position_embeddings <= FAR:
        unreached[f"positions beyond {ours.max_position_embeddings:,}"] = "the model's context ends there"
    if (ours.sliding_window or 0) >= min(ours.max_position_embeddings, probe.LONG):
        unreached["tokens before the sliding window"] = (
            "no sequence read is longer; at its end the mask alone is compared"
        )
    if not probe.is_cheap(ours):
        unreached["the end of the context"] = "decoding to it is left out for large models"
    return unreached


def with_causes(report: Report) -> Report:
    """The report with every class exposed that a cause of its own names."""
    named = {cause.name for cause in report.causes}
    shown = {fault.name for fault in CATALOGUE if fault.accepted & named}
    shown = {name for name in shown if not report.hidden.get(name, ABSENT).startswith(ABSENT)}
    hidden = {name: reason for name, reason in report.hidden.items() if name not in shown}
    return replace(report, exposed=[*report.exposed, *(name for name in report.hidden if name in shown)], hidden=hidden)


def _not_run(fault: Fault, rungs: Sequence[str]) -> str:
    return "" if fault.rung in rungs else f"the rung {fault.rung} {NOT_REACHED}"


def _not_compared(
    fault: Fault, comparison: "Comparison", rungs: Sequence[str], text: Mapping[str, str], export_differs: bool
) -> str:
    """Why there was nothing to see this row by; empty if there was."""
    if fault.needs == TEXT:
        return text.get("") or text.get(fault.name, "")
    if fault.rung != "bits" or comparison.source is not None or export_differs:
        return ""
    return "" if "statistics" in rungs and fault.name in NEVER_RIGHT else NO_SOURCE


def _configs(comparison: "Comparison") -> list[ModelConfig]:
    """The candidate's and, where its folder is known, the reference's: a wrong config is a fault as well."""
    place, configs = comparison.source or comparison.export, [comparison.candidate.config]
    # A folder that the product cannot read is no concern of a comparison that the reference can carry out.
    with suppress(InputError, OSError, ValueError):
        configs += [config.from_hf(json.loads((place / "config.json").read_text()))] if place else []
    return configs


# -- Text ------------------------------------------------------------------------------

_TEMPLATE = (
    *("template without separator", "template without line break", "turn not ended", "roles swapped"),
    *("contents stripped", "system message added", "BOS before the template"),
)
_MASK = (
    "mask of everything",
    "end token not trained",
    "chat mask off by one",
    "reply's header trained",
    "last reply only",
)
WRONG_RULE = "wrong pre-tokenizer regex"
_BYTE_LEVEL = (WRONG_RULE, "merges missing", "hex or byte-level vocabulary")


def _text_reasons(comparison: "Comparison") -> dict[str, str]:
    """Why classes of text could not have shown, by name; the empty name stands for all of them."""
    text = comparison.candidate.text
    if text is not None and not text_reference.references(comparison):
        return {"": text_reference.MISSING}
    reasons = text_reasons(text)
    if text is None:
        return reasons
    if text.saved["kind"] not in PACKAGED and comparison.source is None:
        # The export's rule is the candidate's own, written down.
        reasons |= {WRONG_RULE: NO_SOURCE_TEXT}
    if jinja_reference.is_program(text.saved_template):
        reasons |= _of_program(ids.Walk(comparison, text, text_reference.references(comparison)))
    return reasons


def _of_program(walk: ids.Walk) -> dict[str, str]:
    """What the output of an imported template does not let be compared."""
    cases = [messages for _, messages in walk.cases]
    if not cases:
        return dict.fromkeys((*_TEMPLATE, *_MASK), UNSEEN_CONTENTS)
    proved = any(not walk.text.render(walk.text, messages).unproved for messages in cases)
    return {} if proved else dict.fromkeys(_MASK, UNPROVED)


def text_reasons(text: Text | None) -> dict[str, str]:
    """Those that lie in the text side itself."""
    if text is None:
        return {"": NO_TOKENIZER}
    strings = text.saved["special_token_ids"]
    begins = any(a != b and a.startswith(b) for a in strings for b in strings)
    reasons = {} if begins else {"prefix-matching special": "no special token begins another"}
    if text.saved["kind"] == "char":
        reasons |= dict.fromkeys(_BYTE_LEVEL, "the tokenizer has no merges")
    if not text.saved_template:
        reasons |= dict.fromkeys((*_TEMPLATE, *_MASK), NO_TEMPLATE)
    return reasons
