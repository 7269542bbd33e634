"""The answer for people: where two traces part, and how the difference grows from there."""

from collections.abc import Iterator, Sequence

from jaxgpt.errors import first as listed
from oracle.results import Finding
from oracle.traces import align
from oracle.traces.difference import Difference

BEFORE, AFTER = 3, 8
"""Rows of the table around the first divergence."""
SUGGESTED = 40
"""Lines for a map file that are shown."""


def verdict(difference: Difference) -> str:
    """The answer in one or two sentences."""
    rung = difference.report.rungs[0]
    if rung.inconclusive:
        return f"INCONCLUSIVE. {rung.inconclusive[0].upper()}{rung.inconclusive[1:]}."
    count = len(difference.pairs)
    found = difference.first
    if found is not None:
        return f"FAIL. First divergence: {_named(found)} ({_before(difference)}). {_size(found, difference.unit)}"
    if difference.missing:
        names = listed([finding.tap for finding in difference.missing])
        return f"FAIL. All {count} pairs agree, but these taps have no partner: {names}."
    return f"PASS. No difference beyond noise in {count} taps."


def _before(difference: Difference) -> str:
    """What is known of the taps in front of the first divergence."""
    agree, without = difference.before_first()
    known = f"the {agree} compared before it agree" if agree else "nothing before it was compared"
    return known + (f", {without} before it have no partner" if without else "")


def _named(finding: Finding) -> str:
    return f"{finding.tap}, {finding.where}" if finding.where else finding.tap


def _size(finding: Finding, unit: str) -> str:
    if finding.problem:
        return f"{finding.problem[0].upper()}{finding.problem[1:]}."
    over = "over the tensor" if finding.aggregate >= finding.worst else "at the worst position"
    limit = finding.threshold[0 if finding.aggregate >= finding.worst else 1]
    return f"Error {finding.error:.2g}, {finding.noise:.2g} {unit} {over} (limit {limit:g})."


def lines(difference: Difference, *, everything: bool = False) -> Iterator[str]:
    """The whole answer as text; `everything`: every row of the table."""
    yield verdict(difference)
    for cause in difference.report.causes:
        if cause.residual is not None and cause.residual.sentences:
            yield f"What it looks like: {'; '.join(cause.residual.sentences)}."
    if difference.pairs:
        yield ""
        yield from _table(difference, everything)
    if difference.missing:
        yield ""
        yield "Without a partner:"
        shown = difference.missing if everything else difference.missing[:AFTER]
        yield from (f"  {finding.tap}: {finding.problem}" for finding in shown)
        if len(shown) < len(difference.missing):
            yield f"  … {len(difference.missing) - len(shown)} more (--all shows them)"
    yield from _suggested(difference)
    yield ""
    yield f"Measured by: {difference.measured_by}."
    yield from (f"Note: {note}." for note in difference.notes)


def _table(difference: Difference, everything: bool) -> Iterator[str]:
    """The growth curve: each pair's error in order, at least around where it begins (or is largest)."""
    pairs = difference.pairs
    found = difference.first
    largest = max(range(len(pairs)), key=lambda i: pairs[i].noise)
    start = next((i for i, finding in enumerate(pairs) if finding is found), largest)
    shown = [i for i in range(len(pairs)) if everything or start - BEFORE <= i <= start + AFTER or i == len(pairs) - 1]
    width = max(len("tap"), *(len(pairs[i].tap) for i in shown))
    yield f"    {'tap':<{width}}  {'error':>8}  {'tensor':>8}  {'worst':>8}  ({difference.unit})"
    last = -1
    for i in shown:
        if i > last + 1:
            yield f"    … {i - last - 1} more (--all shows them)"
        yield _row(pairs[i], width, is_first=pairs[i] is found)
        last = i


def _row(finding: Finding, width: int, *, is_first: bool) -> str:
    mark = ">>" if is_first else "  " if finding.ok else " !"
    if finding.problem:
        return f" {mark} {finding.tap:<{width}}  {finding.problem}"
    numbers = f"{finding.error:8.1e}  {_short(finding.aggregate)}  {_short(finding.worst)}"
    return f" {mark} {finding.tap:<{width}}  {numbers}"


def _short(ratio: float) -> str:
    return f"{ratio:8.2f}" if ratio < 1e4 else f"{ratio:8.1e}"


def _suggested(difference: Difference) -> Iterator[str]:
    rules: Sequence[tuple[str, float]] = align.generalised(difference.suggestions)
    if not rules:
        return
    yield ""
    yield "Taps without a partner that look alike; if they are, these lines belong in a --map file:"
    width = max(len(rule) for rule, _ in rules[:SUGGESTED])
    yield from (f"  {rule:<{width}}  # correlation {score:.4f}" for rule, score in rules[:SUGGESTED])
    if len(rules) > SUGGESTED:
        yield f"  # and {len(rules) - SUGGESTED} more"
