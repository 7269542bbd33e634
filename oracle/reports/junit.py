"""The answer as JUnit XML, for GitHub, GitLab, Jenkins and whatever else shows test results.

The form is the one pytest writes (`testsuites`, `testsuite`, `testcase` with `failure`,
`error` or `skipped`, `system-out`), which all of them read: one suite a comparison, one
case a rung. A rung behind a broken one is skipped; an inconclusive one is an error, so
that it is never taken for a pass.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from oracle.reports import terminal
from oracle.reports.outcome import Outcome
from oracle.results import RungResult

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document may hold, not even escaped (section 2.2)."""

Kind = Literal["passed", "failure", "error", "skipped"]


@dataclass(frozen=True)
class _Case:
    name: str
    kind: Kind = "passed"
    message: str = ""
    seconds: float = 0.0
    output: str = ""


def render(outcomes: Sequence[Outcome]) -> str:
    """The whole document."""
    root = Element("testsuites", name="oracle")
    for outcome in outcomes:
        _suite(root, outcome.title, list(_cases(outcome)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: Element, name: str, cases: Sequence[_Case]) -> None:
    counts = {"errors": "error", "failures": "failure", "skipped": "skipped"}
    suite = SubElement(
        root,
        "testsuite",
        {"name": clean(name)}
        | {count: str(sum(case.kind == kind for case in cases)) for count, kind in counts.items()}
        | {"tests": str(len(cases)), "time": f"{sum(case.seconds for case in cases):.3f}"},
    )
    for case in cases:
        _case(suite, name, case)


def _case(suite: Element, comparison: str, case: _Case) -> None:
    # Some readers know a case by class and name alone, so the comparison is in both.
    names = {"classname": clean(f"oracle.{comparison}"), "name": clean(case.name)}
    element = SubElement(suite, "testcase", names | {"time": f"{case.seconds:.3f}"})
    if case.kind != "passed":
        told = SubElement(element, case.kind, message=clean(case.message))
        if case.kind != "skipped":
            told.text = clean(case.message)
    if case.output:
        SubElement(element, "system-out").text = clean(case.output)


def _cases(outcome: Outcome) -> Iterator[_Case]:
    output = "\n".join(terminal.lines(outcome.report))
    if outcome.planted:
        kind: Kind = "passed" if outcome.ok else "failure"
        yield _Case("the planted fault is found", kind, outcome.message, outcome.seconds, output)
        return
    rungs = outcome.report.rungs
    decisive = next((rung for rung in rungs if rung.verdict != "pass"), rungs[-1] if rungs else None)
    for rung in rungs:
        yield _rung(rung, outcome, output if rung is decisive else "")
    for name in outcome.not_reached:
        reason = f"not reached: {decisive.name} is {decisive.verdict}" if decisive else "not reached"
        yield _Case(name, "skipped", reason)


def _rung(rung: RungResult, outcome: Outcome, output: str) -> _Case:
    kinds: dict[str, Kind] = {"pass": "passed", "fail": "failure", "inconclusive": "error"}
    kind = kinds[rung.verdict]
    message = "" if kind == "passed" else outcome.message if output else rung.inconclusive or rung.summary
    return _Case(rung.name, kind, message, rung.seconds, output)


def clean(text: str) -> str:
    """The text with what XML cannot hold written out, as Python does."""
    return NOT_XML.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)
