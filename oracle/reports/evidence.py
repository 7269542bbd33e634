"""What the answer rests on: the ladder, the maps, the look of the difference, tokens, limits, environment."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from oracle.reports import charts, heat_map, wording
from oracle.reports.markup import Markup, escape, join, tag
from oracle.reports.typesetting import name, number, prose
from oracle.results import CONFIG_FIELD, Cause, Finding, Report, Residual, RungResult, Token

ASKS = {
    "environment": "Can a comparison here mean anything?",
    "ids": "Does text become the same ids?",
    "bits": "Are the parameters those of the file?",
    "statistics": "Can their values be right?",
    "operators": "Is each op right by itself?",
    "forward": "Do both agree when they run freely?",
    "loss": "Is the loss of each token the same?",
    "gradients": "Is the gradient of each parameter?",
    "optimizer": "Are the parameters after some steps?",
    "decode": "Does cached decoding agree?",
    "golden": "Are the golden prompts’ answers the reference’s?",
}
"""The rungs in causal order, and what each asks."""
MAPS = {
    "operators": ("Local error", "Each op on the reference’s inputs"),
    "forward": ("Own and inherited error", "Both models running freely"),
    "gradients": ("Gradients", "Each parameter’s gradient"),
}
"""Rungs that are drawn whenever they were climbed."""
OTHER_MAPS = {
    "bits": ("Parameters", "Each against the file"),
    "statistics": ("Parameters’ statistics", "Each against what its kind can be"),
    "optimizer": ("Optimizer", "Each parameter after its steps"),
    "decode": ("Cached decoding", "The worst of prefill and steps"),
}
"""Rungs that are drawn when they fail."""
MARK = {"pass": "✓", "fail": "✕", "inconclusive": "?"}
LISTED = 40
"""Rows of a list of findings."""
HARDEST = 8
"""Tokens that are shown before the table folds."""
MOST_TOKENS = 1000


def section(title: str, *content: Markup | str) -> Markup:
    """A part of the page, left out where it has nothing to say."""
    return tag("section", tag("h2", title), *content) if any(content) else Markup()


def folded(summary: str, *content: Markup | str) -> Markup:
    """Shown on request."""
    return tag("details", tag("summary", summary), *content)


def _head(columns: Sequence[str], figures: Sequence[str] = ()) -> Markup:
    heads = (tag("th", column, scope="col", class_="figure" if column in figures else None) for column in columns)
    return tag("thead", tag("tr", *heads))


# -- The ladder ------------------------------------------------------------------------


def ladder(report: Report) -> Markup:
    """One row a rung; those not climbed by name."""
    climbed = {rung.name: rung for rung in report.rungs}
    after = {rung.name: rung for rung in report.repaired.rungs} if report.repaired else {}
    order = list(dict.fromkeys([*ASKS, *climbed, *after]))
    columns = ["Rung", "Verdict", *(["Repaired"] if after else []), "Time", "What was compared"]
    head = _head(columns)
    known = [rung for rung in order if rung in climbed or rung in after]
    rows = [_climbed(rung, climbed.get(rung), after.get(rung), both=bool(after)) for rung in known]
    caption = tag("caption", "In causal order: what breaks one rung may break all behind it.")
    table = tag("table", caption, head, tag("tbody", *rows), class_="ladder")
    missing = join((tag("code", rung) for rung in order if rung not in known), ", ")
    note = tag("p", "Not climbed: ", missing, ".", class_="hint") if missing else ""
    return section("The ladder", tag("div", table, class_="scroll"), note)


def _climbed(rung: str, was: RungResult | None, after: RungResult | None, *, both: bool) -> Markup:
    said = was or after
    assert said is not None
    cells = [
        tag("th", tag("code", rung), tag("small", ASKS.get(rung, "")), scope="row"),
        tag("td", _verdict(was)),
        tag("td", _verdict(after), class_="repaired") if both else "",
        tag("td", f"{said.seconds:.1f} s", class_="figure"),
        tag("td", *_summaries(was, after), class_="what"),
    ]
    return tag("tr", *cells)


def _summaries(was: RungResult | None, after: RungResult | None) -> Iterator[Markup]:
    if was is not None:
        yield prose(was.summary)
    if after is not None and (was is None or after.verdict != was.verdict):
        yield tag("small", "repaired: ", prose(after.summary))


def _verdict(rung: RungResult | None) -> Markup:
    if rung is None:
        return tag("span", "not climbed", class_="none")
    return tag("span", tag("b", MARK[rung.verdict], aria_hidden="true"), f" {rung.verdict}", class_=rung.verdict)


# -- Maps ------------------------------------------------------------------------------


def maps(report: Report) -> Markup:
    """Layers × taps of the rungs that have such."""
    drawn: list[tuple[RungResult, str, str]] = []
    for rung in report.rungs:
        known = MAPS.get(rung.name) or (OTHER_MAPS.get(rung.name) if rung.verdict == "fail" else None)
        if known and any(found.tap for found in rung.findings):
            drawn.append((rung, *known))
    if not drawn:
        return Markup()
    measured = {heat_map.arrange(rung).is_measured for rung, *_ in drawn}
    keys = [heat_map.key(kind) for kind in sorted(measured, reverse=True)]
    figures = tag("div", *(heat_map.render(*item) for item in drawn), class_="figures")
    hint = tag("p", "Point at a cell, or walk through a map with the arrow keys, to read its numbers.", class_="hint")
    title = "Where it differs" if report.broken else "Layer by layer"
    return section(title, *_reading(report), *keys, figures, hint, *map(_broken, report.rungs))


def _reading(report: Report) -> Iterator[Markup]:
    broken = {rung.name for rung in report.rungs if rung.verdict == "fail"}
    if "operators" in broken and len(broken) > 1:
        text = "Local error shows where a difference begins; the other maps, what it does to all that follows."
        yield tag("p", text)
    first = report.broken.first if report.broken else None
    if "operators" not in broken and "forward" in broken and first and not first.tap.startswith(CONFIG_FIELD):
        text = "Each op is right on the reference’s inputs, so the first to differ here was given something else."
        yield tag("p", text)
    if report.broken is not None and report.broken.name == "loss":
        yield tag("p", "The rung loss compares numbers of whole batches, and no layers: it has no map.")


def _broken(rung: RungResult) -> Markup:
    broken = [found for found in rung.findings if not found.ok]
    if not broken:
        return Markup()
    columns = ("Tap or parameter", "Op", "At", "Error", "Whole tensor", "Worst position", "Problem")
    head = _head(columns, figures=columns[3:6])
    title = f"{len(broken):,} of {len(rung.findings):,} comparisons of the rung {rung.name} are beyond their limit"
    more = f", the first {LISTED} in causal order" if len(broken) > LISTED else ""
    rows = [_finding(found) for found in broken[:LISTED]]
    table = tag("table", tag("caption", f"Ratios are multiples of the noise, with their limits{more}."), head)
    table = tag("table", tag("caption", _CAPTION + more + "."), head, tag("tbody", *rows), class_="list")
    return folded(title, tag("div", table, class_="scroll"))


_CAPTION = "Ratios are multiples of the noise, each with its limit"


def _finding(found: Finding) -> Markup:
    sized = max(found.threshold) > 0
    ratios = zip((found.aggregate, found.worst), found.threshold, strict=True)
    measures = [number(found.error), *(f"{number(ratio)} ({number(limit)})" for ratio, limit in ratios)]
    return tag(
        "tr",
        tag("th", name(found.tap), scope="row"),
        tag("td", wording.CLAIMS.get(found.tap, found.op)),
        tag("td", wording.where(found)),
        *(tag("td", measure if sized else "–", class_="figure") for measure in measures),
        tag("td", prose(found.problem or wording.values(found))),
    )


# -- What the difference looks like ----------------------------------------------------


def residuals(report: Report) -> Markup:
    """The structure of each cause's difference."""
    shown = [(cause, cause.residual) for cause in report.causes[:MAX_RESIDUALS] if cause.residual is not None]
    return section("What the difference looks like", *(_residual(*item) for item in shown))


MAX_RESIDUALS = 8


def _residual(cause: Cause, residual: Residual) -> Markup:
    title = tag("h3", name(wording.place(cause.rung, cause.before)))
    said = [tag("li", prose(wording.sentence(text))) for text in residual.sentences]
    shape = " × ".join(f"{axis} {size:,}" for axis, size in zip(residual.profiles, residual.shape, strict=False))
    numbers = f"Shape {shape}. Nearest multiple of the truth: {number(residual.scale, 6)}; "
    numbers += f"correlation with it: {residual.correlation:.6f}."
    axes = zip(residual.profiles.items(), residual.shape, strict=False)
    profiles = [_profile(axis, values, size) for (axis, values), size in axes if len(values) > 1]
    drawn = tag("div", *profiles, class_="profiles") if profiles else ""
    return join([title, tag("ul", *said), tag("p", numbers), drawn])


def _profile(axis: str, values: Sequence[float], size: int) -> Markup:
    finite = [value for value in values if math.isfinite(value)]
    span = f"0 – {size - 1:,}, up to {number(max(finite, default=0.0))}"
    caption = tag("figcaption", tag("strong", f"along {axis}"), " ", tag("span", span))
    return tag("figure", charts.bars(values[:256], size, axis), caption)


# -- Tokens ----------------------------------------------------------------------------


def tokens(report: Report) -> Markup:
    """The greedy choices that were hardest to make."""
    return section("Greedy tokens", *(_tokens(rung) for rung in report.rungs if rung.tokens))


def _tokens(rung: RungResult) -> Markup:
    counts = {outcome: sum(token.outcome == outcome for token in rung.tokens) for outcome in ("exact", "tie", "wrong")}
    said = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items() if count)
    said = f"all {said.partition(' ')[2]}" if sum(map(bool, counts.values())) == 1 else said
    lead = (
        f"{rung.summary}. The {len(rung.tokens):,} that were hardest to make are kept here: {said}. A tie is another "
        "choice than the reference’s, by less than the noise of its logits: rounding alone can make it. Behind a "
        "difference, tokens are judged by what the reference says to the candidate’s own text."
    )
    hardest = sorted(rung.tokens, key=lambda token: (token.outcome != "wrong", _closeness(token)))
    top, rest = hardest[:HARDEST], hardest[HARDEST:MOST_TOKENS]
    shown = tag("div", _token_table(top), class_="scroll")
    more = folded(f"{len(rest):,} more", tag("div", _token_table(rest), class_="scroll")) if rest else ""
    return join([tag("p", prose(lead)), shown, more])


def _closeness(token: Token) -> float:
    """The margin in multiples of the noise: small is hard."""
    return token.margin / token.noise if token.noise > 0 else float("inf")


def _token_table(tokens: Sequence[Token]) -> Markup:
    columns = ("Prompt", "Step", "Chosen", "Reference", "Margin", "Deficit", "Noise", "Margin ÷ noise", "Outcome")
    head = _head(columns, figures=columns[:-1])
    caption = "In logits. Margin: the reference’s first choice over its second. Deficit: the chosen id below the first."
    return tag("table", tag("caption", caption), head, tag("tbody", *map(_token, tokens)), class_="list")


def _token(token: Token) -> Markup:
    whole = [f"{value:,}" for value in (token.prompt, token.step, token.chosen, token.expected)]
    measured = [number(value) for value in (token.margin, token.deficit, token.noise, _closeness(token))]
    outcome = tag("td", tag("span", token.outcome, class_="fail" if token.outcome == "wrong" else "pass"))
    return tag("tr", *(tag("td", value, class_="figure") for value in [*whole, *measured]), outcome)


# -- What could have shown, and where it ran -------------------------------------------


def exposure(report: Report) -> Markup:
    """Which faults this run could have seen, and which not, with the reasons."""
    reasons: dict[str, list[str]] = {}
    exposed, others = report.exposed_classes, report.hidden_classes
    for fault, reason in others.items():
        reasons.setdefault(reason, []).append(fault)
    count = f"{len(exposed)} of {len(exposed) + len(others)}"
    shown = folded(f"Would have shown {count} known kinds of fault", _list(exposed))
    lead = tag("p", f"Nothing is said about {len(others)} others:") if reasons else ""
    hidden = (folded(f"{_upper(reason)}: {len(names)}", _list(names)) for reason, names in reasons.items())
    beyond = (tag("p", wording.beyond(*item)) for item in report.unreached.items())
    return section("What these inputs could expose", shown, lead, *hidden, *beyond)


def _list(names: Sequence[str]) -> Markup:
    return tag("p", ", ".join(wording.quoted(names)) + ".")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def environment(report: Report) -> Markup:
    """Versions, dtype, config, calibration."""
    plain = {key: value for key, value in report.environment.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in report.environment.items() if isinstance(value, dict) and value}
    return section("Environment", _table(plain), *(folded(_label(key), _table(value)) for key, value in nested.items()))


def _table(values: Mapping[str, Any]) -> Markup:
    rows = [tag("div", tag("dt", _label(key)), tag("dd", _value(value))) for key, value in values.items()]
    return tag("dl", *rows, class_="values") if rows else Markup()


def _label(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} …"


def sections(report: Report) -> Iterator[Markup]:
    """All of it, in the order in which it is read."""
    for part in (ladder, maps, residuals, tokens, exposure, environment):
        yield part(report)
    yield tag("footer", tag("p", escape(_TERMS)))


_TERMS = (
    "Truth is the reference in float64. Noise is how far the same reference is from it in the candidate’s own dtype: "
    "what rounding costs an honest implementation. Limits come from clean runs, for each op and dtype; the whole "
    "tensor and its worst position must both hold."
)
