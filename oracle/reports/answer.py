"""The top of the page: the verdict, where the models part, why, the proof, and what to change."""

from collections.abc import Iterator, Sequence

from oracle.reports import charts, wording
from oracle.reports.markup import Markup, escape, join, tag
from oracle.reports.typesetting import name, number, prose
from oracle.results import UNKNOWN, Cause, Report, RungResult

SHOWN = 6
"""Taps at which the same repair helps before the list folds."""
MOST_CAUSES = 50


def render(report: Report) -> Markup:
    """The page's header."""
    head = tag("p", _models(report), class_="models")
    word = tag("h1", report.verdict.upper(), class_=f"verdict {report.verdict}")
    lead = tag("p", _lead(report), class_="lead")
    return tag("header", head, tag("div", word, lead, class_="headline"), _facts(report))


def _models(report: Report) -> str:
    """What was compared, as far as the environment says."""
    of, config = report.environment.get, report.environment.get("config")
    config = config if isinstance(config, dict) else {}
    parts = [f"{config[key]} {word}" for key, word in _SIZES.items() if isinstance(config.get(key), int)]
    parts += [str(of("dtype"))] if of("dtype") else []
    sides = [f"{label} {of(key)}" for key, label in (("jax", "JAX"), ("torch", "PyTorch")) if of(key)]
    models = [f"{of('checkpoint')} against {of('reference')}"] if of("checkpoint") else []
    planted = [f"planted: {of('planted')}"] if of("planted") else []
    return " · ".join(part for part in ("Oracle report", *models, *parts, " against ".join(sides), *planted) if part)


_SIZES = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads"}


def _lead(report: Report) -> Markup:
    if report.verdict == "pass":
        return escape("No difference beyond measured noise.")
    if report.verdict == "inconclusive":
        rung = next(rung for rung in report.rungs if rung.verdict == "inconclusive")
        return prose(wording.sentence(rung.inconclusive))
    rung = report.broken
    assert rung is not None
    assert rung.first is not None
    part = "The two models part at " if rung.first.tap else "The model cannot be compared: it stops at "
    cause = report.causes[0] if report.causes else None
    why = ""
    if cause is not None and cause.name != UNKNOWN:
        why = f" {wording.sentence(cause.name)}"
    elif cause is not None:
        why = " No known repair undoes it."
    return join([part, name(wording.place(rung.name, rung.first)), ".", why])


def _facts(report: Report) -> Markup:
    if report.verdict == "pass":
        return tag("dl", *_passed(report), class_="facts")
    if report.verdict == "inconclusive":
        text = "This says nothing about the model. Set right what is named above and compare again."
        return tag("dl", *_fact("What it means", escape(text)), class_="facts")
    rung = report.broken
    assert rung is not None
    return tag("dl", *_fact("First divergence", _divergence(rung)), *_causes(report), class_="facts")


def _passed(report: Report) -> Iterator[Markup]:
    rungs = join((tag("code", rung.name) for rung in report.rungs), ", ")
    yield from _fact("Agree", join([f"All {len(report.rungs)} rungs that were climbed: ", rungs, "."]))
    kl = wording.kl(report)
    if kl is not None:
        yield from _fact("Largest KL per token", prose(f"{kl:.1e} nats"))


def _fact(label: str, *content: Markup) -> Iterator[Markup]:
    if content:
        yield tag("div", tag("dt", label), *(tag("dd", part) for part in content))


def _divergence(rung: RungResult) -> Markup:
    found = rung.first
    assert found is not None
    if not found.tap:
        return join([f"In the rung {rung.name}. ", prose(wording.size(rung.name, found))])
    kind = wording.kind(rung.name, found)
    parts: list[object] = [name(wording.place(rung.name, found)), f" · {kind}" if kind else ""]
    parts.append(f" · {wording.where(found)}" if found.where else "")
    parts.append(f" · rung {rung.name}. ")
    parts.append(
        "Its inputs are the reference’s own, so the difference begins here. " if rung.name == "operators" else ""
    )
    return join([*parts, prose(wording.size(rung.name, found))])


# -- Causes ----------------------------------------------------------------------------


def _causes(report: Report) -> Iterator[Markup]:
    if not report.causes:
        text = ["Not looked for: ", tag("code", "python -m oracle bisect"), " with the same arguments looks for it."]
        yield from _fact("Cause", join(text))
        return
    for place, cause in enumerate(report.causes[:MOST_CAUSES], start=1):
        yield from _cause(report, cause, place)
    more = len(report.causes) - MOST_CAUSES
    if more > 0:
        yield from _fact("Further causes", escape(f"{more:,} more"))
    yield from _outcome(report)


def _cause(report: Report, cause: Cause, place: int) -> Iterator[Markup]:
    standing = wording.standing(cause)
    badge = tag("span", standing, class_=f"badge {standing.replace(' ', '-')}")
    title: list[object] = [tag("strong", cause.name[:1].upper() + cause.name[1:])]
    title += [" ", badge] if cause.name != UNKNOWN else []
    if place > 1 or cause.seen_in:
        title += [" at ", name(wording.cause_place(cause))]
    yield from _fact("Cause" if place == 1 else f"Cause {place}, behind it", join(title), *_doubts(cause))
    if cause.name == UNKNOWN:
        look = wording.look(cause)
        yield from _fact("Look at", *([prose(wording.sentence(look))] if look else []))
    else:
        yield from _fact("Proof", prose(wording.proof(cause)), *_drawn(cause))
    if cause.advice:
        yield from _fact("Change", prose(wording.sentence(cause.advice)))
    if wording.layers(report, cause):
        yield from _fact("Layers", escape(wording.sentence(wording.layers(report, cause))))
    same, behind = wording.places(cause)
    if same:
        yield from _fact("The same at", _names(same))
    if behind:
        yield from _fact("Seen again at", _names(behind))


def _doubts(cause: Cause) -> Iterator[Markup]:
    if cause.seen_in:
        yield escape(wording.hidden(cause))
    if cause.tied:
        yield prose(f"Or: {'; '.join(cause.tied)}.")
    if wording.reservation(cause):
        yield escape(wording.reservation(cause))
    if cause.name == UNKNOWN:
        yield prose(wording.proof(cause))
        if cause.residual is not None and cause.residual.sentences:
            yield prose(wording.sentence(f"What it looks like: {'; '.join(cause.residual.sentences)}"))
        if cause.runners_up:
            yield prose(f"Nearest to undoing it: {'; '.join(cause.runners_up)}.")


def _drawn(cause: Cause) -> Iterator[Markup]:
    measure = cause.before.measure
    before, after, limit = (of[measure] for of in (cause.before.ratios, cause.after.ratios, cause.before.threshold))
    if before > 0 and limit > 0:
        drawn = charts.fall(before, after, limit)
        caption = f"Multiples of the noise ({wording.MEASURES[measure]}); shaded: within the limit of {number(limit)}"
        yield tag("figure", drawn, tag("figcaption", caption))


def _names(taps: Sequence[str]) -> Markup:
    shown = join(map(name, taps[:SHOWN]), ", ")
    if len(taps) <= SHOWN:
        return shown
    rest = join(map(name, taps[SHOWN : SHOWN + 500]), ", ")
    return join([shown, tag("details", tag("summary", f"{len(taps) - SHOWN:,} more"), rest)])


def _outcome(report: Report) -> Iterator[Markup]:
    after = report.repaired
    if after is None:
        text = "Nothing behind it was examined: it could not be taken out of the way."
        yield from _fact("Behind it", escape(text))
        return
    word = tag("strong", after.verdict.upper(), class_=after.verdict)
    rungs = join((tag("code", rung.name) for rung in after.rungs if rung.verdict == "pass"), ", ")
    begin, end = wording.agree(sum(rung.verdict == "pass" for rung in after.rungs))
    said = join([begin, rungs, end]) if rungs else escape(".")
    broken = after.broken
    if broken is not None and broken.first is not None:
        said = join([" at ", name(wording.place(broken.name, broken.first)), f" in the rung {broken.name}."])
    if any(cause.name == UNKNOWN for cause in report.causes):
        yield from _fact("Behind it", join([wording.repaired(report), ": ", word, said]))
    else:
        yield from _fact(wording.repaired(report), join([word, said]))
