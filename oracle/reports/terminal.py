"""The answer for people: a verdict in words and a compact table of rungs."""

from collections.abc import Iterator

from oracle.results import Finding, Report, RungResult

PASS, FAIL, INCONCLUSIVE = 0, 1, 3
"""Exit codes of a comparison that was carried out."""


def exit_code(report: Report) -> int:
    """0 pass, 1 fail, 3 inconclusive."""
    return {"pass": PASS, "fail": FAIL, "inconclusive": INCONCLUSIVE}[report.verdict]


def verdict(report: Report) -> str:
    """The answer in one or two sentences."""
    if report.verdict == "pass":
        kl = next((f.error for rung in report.rungs for f in rung.findings if f.op == "kl"), None)
        detail = "" if kl is None else f" Max KL per token {kl:.1e} nats."
        return f"PASS. No difference beyond measured noise in {_listed(report)}.{detail}"
    if report.verdict == "inconclusive":
        rung = next(rung for rung in report.rungs if rung.verdict == "inconclusive")
        return f"INCONCLUSIVE. {rung.inconclusive}."
    rung = report.broken
    assert rung is not None
    assert rung.first is not None
    return f"FAIL. First divergence: {_place(rung, rung.first)}. {_size(rung, rung.first)}"


def _listed(report: Report) -> str:
    return ", ".join(rung.name for rung in report.rungs)


def _place(rung: RungResult, found: Finding) -> str:
    where = f" ({found.where})" if found.where else ""
    if rung.name == "bits":
        return f"{found.tap}.{found.op}, a parameter{where}"
    if rung.name == "operators":
        return f"{found.tap}, op {found.op}{where} (its inputs are clean)"
    return f"{found.tap}, op {found.op}{where}"


def _size(rung: RungResult, found: Finding) -> str:
    if found.problem:
        return f"{found.problem[0].upper()}{found.problem[1:]}."
    kind = "Local error" if rung.name == "operators" else "Error"
    name, ratio = ("aggregate", found.aggregate) if found.aggregate >= found.worst else ("worst position", found.worst)
    limit = found.threshold[0 if name == "aggregate" else 1]
    return f"{kind} {found.error:.2g}, {ratio:.2g} times the noise ({name}; limit {limit:.2g})."


def lines(report: Report) -> Iterator[str]:
    """The whole report as text."""
    yield verdict(report)
    yield ""
    for rung in report.rungs:
        yield f"  {rung.name:<12} {rung.verdict:<12} {rung.seconds:6.1f} s  {rung.summary}"
    yield ""
    yield from _further(report)
    yield f"Could have shown: {', '.join(report.exposed)}."
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.hidden.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"Could not have shown ({reason}): {', '.join(names)}."


def _further(report: Report) -> Iterator[str]:
    rung = report.broken
    if rung is None:
        return
    others = [finding for finding in rung.findings if not finding.ok][1:]
    shown = dict.fromkeys(f"{other.tap} {other.where}".strip() for other in others)
    if shown:
        names = list(shown)
        more = f" (+{len(names) - 3} more)" if len(names) > 3 else ""
        yield f"Also beyond noise in this rung: {', '.join(names[:3])}{more}."
