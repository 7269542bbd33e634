"""The answer for people: a verdict in words, a compact table of rungs, the causes with their proofs."""

from collections.abc import Iterator

from oracle.reports import wording
from oracle.results import UNKNOWN, Cause, Finding, Report, RungResult

PASS, FAIL, INCONCLUSIVE = 0, 1, 3
"""Exit codes of a comparison that was carried out."""
SHOWN = 3
"""Names in a list before it says how many more there are."""


def exit_code(report: Report) -> int:
    """0 pass, 1 fail, 3 inconclusive."""
    return {"pass": PASS, "fail": FAIL, "inconclusive": INCONCLUSIVE}[report.verdict]


def verdict(report: Report) -> str:
    """The answer in one or two sentences."""
    if report.verdict == "pass":
        kl = wording.kl(report)
        detail = "" if kl is None else f" Max KL per token {kl:.1e} nats."
        return f"PASS. No difference beyond measured noise in {_listed(report)}.{detail}"
    if report.verdict == "inconclusive":
        rung = next(rung for rung in report.rungs if rung.verdict == "inconclusive")
        return f"INCONCLUSIVE. {wording.sentence(rung.inconclusive)}"
    rung = report.broken
    assert rung is not None
    assert rung.first is not None
    return f"FAIL. First divergence: {_place(rung, rung.first)}. {wording.size(rung.name, rung.first)}"


def _listed(report: Report) -> str:
    return ", ".join(rung.name for rung in report.rungs)


def _place(rung: RungResult, found: Finding) -> str:
    place, where = wording.place(rung.name, found), wording.where(found)
    if rung.name == "bits" and found.op:
        return f"{place}, a parameter, {where}" if where else f"{place}, a parameter"
    where = f" ({where})" if where else ""
    if not found.tap:
        return f"{place}{where}"
    if rung.name == "operators":
        return f"{place}, op {found.op}{where} (its inputs are clean)"
    # What an op or a parameter is called does not say which of the rungs compared it.
    kind = wording.kind(rung.name, found)
    return f"{place}{', ' if kind else ''}{kind}{where}, in the rung {rung.name}"


def lines(report: Report) -> Iterator[str]:
    """The whole report as text."""
    if "planted" in report.environment:
        yield f"A fault was planted: {report.environment['planted']}. Nothing here is said of the model as it is."
    yield verdict(report)
    yield ""
    yield from causes(report)
    for rung in report.rungs:
        # Why a rung is inconclusive is the answer above.
        summary = rung.summary if rung.summary != rung.inconclusive else ""
        yield f"  {rung.name:<12} {rung.verdict:<12} {rung.seconds:6.1f} s  {summary}".rstrip()
    yield ""
    yield from _further(report)
    yield from _exposure(report)
    if report.verdict == "fail" and not report.causes:
        yield "What to do next: `python -m oracle bisect` with the same arguments looks for the cause."


def _exposure(report: Report) -> Iterator[str]:
    exposed, hidden = report.exposed_classes, report.hidden_classes
    known = len(exposed) + len(hidden)
    if not known:  # a comparison of traces: what could be wrong in them is not known
        return
    yield f"Could have shown {len(exposed)} of {known} known kinds of fault (--html and --json name them all)."
    names: dict[str, list[str]] = {}
    for name, reason in hidden.items():
        names.setdefault(_summarized(reason), []).append(name)
    if names:
        yield "Could not have shown:"
    yield from (f"  {len(of):>4}  {reason}: {wording.first(wording.quoted(of), SHOWN)}" for reason, of in names.items())
    yield from (wording.beyond(*item) for item in report.unreached.items())


def _summarized(reason: str) -> str:
    if reason.startswith("the rung "):
        return "their rungs were not reached"
    return "they exist only in other models" if reason.startswith("exists only") else reason


def _further(report: Report) -> Iterator[str]:
    rung = report.broken
    if rung is None:
        return
    others = [finding for finding in rung.findings if not finding.ok][1:]
    shown = dict.fromkeys(f"{wording.place(rung.name, o)} {wording.where(o)}".strip() for o in others)
    if shown:
        what = "different" if rung.name == "ids" else "beyond noise"
        yield f"Also {what} in this rung: {wording.first(list(shown), SHOWN)}."


# -- Causes ----------------------------------------------------------------------------


def causes(report: Report) -> Iterator[str]:
    """Each cause with its proof and what to change, then what became of the repaired model."""
    for number, cause in enumerate(report.causes, start=1):
        label = "Cause" if number == 1 else f"Cause {number}, behind it"
        standing = "" if cause.name == UNKNOWN else f" ({wording.standing(cause)})"
        yield f"{label}: {cause.name}, at {wording.cause_place(cause)}{standing}."
        yield from (f"  {line}" for line in _explained(report, cause))
    if report.repaired is not None:
        yield f"{wording.repaired(report)}: {verdict(report.repaired)}"
    if report.causes:
        yield ""


def _explained(report: Report, cause: Cause) -> Iterator[str]:
    if cause.seen_in:
        yield wording.hidden(cause)
    yield wording.proof(cause)
    if cause.tied:
        yield f"Tied with: {'; '.join(cause.tied)}."
    if wording.reservation(cause):
        yield wording.reservation(cause)
    if cause.advice:
        yield f"Change: {cause.advice}."
    if cause.name == UNKNOWN and cause.residual is not None and cause.residual.sentences:
        yield f"The difference: {'; '.join(cause.residual.sentences)}."
    if cause.name == UNKNOWN and wording.look(cause):
        yield f"Look at: {wording.look(cause)}."
    if cause.runners_up:
        yield f"Nearest to undoing it: {'; '.join(cause.runners_up)}."
    if wording.layers(report, cause):
        yield f"Layers: {wording.layers(report, cause)}."
    same, behind = wording.places(cause)
    if same:
        yield f"The same at: {wording.first(same, SHOWN)}."
    if behind:
        yield f"Seen again at: {wording.first(behind, SHOWN)}."
