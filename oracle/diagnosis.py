"""Why a model differs: at each place where a difference begins, look for the change that undoes it.

A cause is named only if a repair brings the difference down to the noise, measured on
the reference's own inputs; then the repaired candidate goes on up the ladder, so that
a second fault behind the first is found as well. What no repair undoes is `unknown`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import jax

from oracle import finer, ladder, threads
from oracle.candidate import Candidate, Unrunnable
from oracle.comparison import Comparison
from oracle.repairs.catalogue import REPAIRS
from oracle.repairs.repair import Repair, Variant
from oracle.results import UNKNOWN, Cause, Finding, Report, RungResult
from oracle.rungs import bits, decode, forward, gradients, loss, optimizer
from oracle.rungs.operators import OpSite
from oracle.site import Site

MOST_CAUSES = 8
"""A model with more faults than that is not repaired one by one."""
INHERITED = (forward.NAME, decode.NAME)
"""Rungs in which a difference spreads to what is computed from it."""
TRAINING = (loss.NAME, gradients.NAME, optimizer.NAME)
FALLS = 0.5
"""A repair takes away at least half of the error: a limit that was barely exceeded proves nothing."""


def bisect(
    comparison: Comparison,
    *,
    everything: bool = False,
    rungs: Sequence[str] = tuple(ladder.LADDER),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """`ladder.climb`, then the causes of what it found, one behind the other.

    The verdict, rungs and first divergence are those of the candidate as it is.
    """
    report = ladder.climb(comparison, everything=everything, rungs=rungs, progress=progress)
    causes: list[Cause] = []
    now, before = report, None
    for _ in range(MOST_CAUSES):
        if (rung := now.broken) is None:
            break
        progress(f"diagnosis of {rung.name}")
        if causes and (trained := _trained_as_run(comparison, rung)) is not None:
            comparison, causes = replace(comparison, candidate=trained), _shown_in(causes, rung)
            now = before = _after(before, ladder.climb(comparison, rungs=_from(rung.name, rungs), progress=progress))
            continue
        if rung.name in TRAINING and comparison.candidate.has_no_gradient:
            # It runs the product's own op, of which no more is known: what else it may have is not to be seen.
            causes = _shown_in(causes, rung, "by this or by another cause")
            rungs = [name for name in rungs if name not in TRAINING]
            now = before = _after(before, ladder.climb(comparison, rungs=_from(rung.name, rungs), progress=progress))
            continue
        place, first = finer.look(comparison, rung, progress) or (comparison, rung)
        with jax.default_matmul_precision("highest"), threads.fitting(comparison.candidate.config):
            cause, repaired = explain(place, first)
        if place is not comparison:
            cause = replace(cause, seen_in=place.candidate.dtype)
        if repaired is None:
            causes.append(cause)
            break
        # A repaired candidate is no longer the one that was exported, nor the one that gave the golden answers.
        export = None if rung.name == bits.NAME else comparison.export
        repaired = replace(repaired, dtype=comparison.candidate.dtype)
        comparison = replace(comparison, candidate=repaired, export=export, golden=None)
        # Rungs below this one have passed, and no repair here can reach them.
        now = before = _after(before, ladder.climb(comparison, rungs=_from(rung.name, rungs), progress=progress))
        behind = now if place.candidate.dtype == repaired.dtype else _again(place, repaired, first.name, rungs)
        cause = replace(cause, proved=cause.name != UNKNOWN and not _still_broken(cause, behind))
        causes = joined(causes, cause)
    return replace(report, causes=causes, repaired=now if causes and now is not report else None)


def _after(before: Report | None, now: Report) -> Report:
    """A climb with repairs, and what had passed with those before: no further repair reaches down there."""
    if before is None:
        return now
    climbed = {rung.name for rung in now.rungs}
    passed = [rung for rung in before.rungs if rung.verdict == "pass" and rung.name not in climbed]
    hidden = {name: reason for name, reason in now.hidden.items() if name not in before.exposed}
    exposed = list(dict.fromkeys((*before.exposed, *now.exposed)))
    return replace(now, rungs=[*passed, *now.rungs], exposed=exposed, hidden=hidden)


def _again(place: Comparison, repaired: Candidate, rung: str, rungs: Sequence[str]) -> Report:
    """The rung of a cause that only a finer dtype shows, and the one behind it, in that dtype."""
    candidate = replace(repaired, dtype=place.candidate.dtype)
    return ladder.climb(replace(place, candidate=candidate), rungs=_from(rung, rungs)[:2])


def _from(rung: str, rungs: Sequence[str]) -> list[str]:
    """The rung and those above it."""
    order = list(ladder.LADDER)
    return [name for name in order[order.index(rung) :] if name in rungs]


def _trained_as_run(comparison: Comparison, rung: RungResult) -> Candidate | None:
    """The candidate with its repaired ops in training too, where that is what the rung misses.

    Training runs the product's own ops: a mistake in the product's code was so far undone in the forward pass alone.
    """
    candidate, first = comparison.candidate, rung.first
    if rung.name not in TRAINING or not candidate.runs_otherwise or candidate.has_no_gradient or first is None:
        return None
    trained = candidate.trained_as_run()
    if trained.training == candidate.training:
        return None
    after = ladder.site(comparison, rung.name, first).measure(trained)
    # Another mistake of training may remain behind; one in words, such as a wrong batch, is no smaller or larger.
    nearer = not first.problem and not after.problem and after.error <= FALLS * first.error
    return trained if after.ok or nearer else None


def _shown_in(causes: Sequence[Cause], rung: RungResult, doubt: str = "") -> list[Cause]:
    """The causes, the last of which is seen in this rung as well."""
    assert rung.first is not None
    *others, last = causes
    place = f"{rung.first.tap} ({', '.join(filter(None, (f'rung {rung.name}', doubt)))})"
    return [*others, replace(last, also_at=[*last.also_at, place])]


def _still_broken(cause: Cause, report: Report) -> bool:
    place = (cause.rung, cause.tap, cause.before.op, cause.before.where)
    return any(place == (rung.name, f.tap, f.op, f.where) for rung in report.rungs for f in rung.findings if not f.ok)


def joined(causes: Sequence[Cause], cause: Cause) -> list[Cause]:
    """The causes with one more, which may be one of them at a further place.

    A mistake that a forward and a cached step share is undone in each, as is one of the loss
    in its gradient, and what rounding hid of a cause is found in a finer dtype.
    """
    known = next((each for each in causes if _is_one(each, cause)), None)
    if known is None:
        return [*causes, cause]
    places = [cause.tap, *cause.also_at]
    if cause.rung != known.rung:
        places = [f"{tap} (rung {cause.rung})" for tap in places]
    also = [place for place in dict.fromkeys((*known.also_at, *places)) if place != known.tap]
    return [replace(each, also_at=also) if each is known else each for each in causes]


def _is_one(known: Cause, cause: Cause) -> bool:
    if known.name != cause.name or not (known.proved and cause.proved) or list(known.tied) != list(cause.tied):
        return False
    if known.rung == cause.rung:
        return known.advice == cause.advice and known.seen_in != cause.seen_in
    if known.rung in TRAINING and cause.rung in TRAINING:
        return known.advice == cause.advice
    return known.change == cause.change and known.tap == cause.tap


# -- One place -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    repair: Repair
    variant: Variant
    after: Finding


def explain(comparison: Comparison, rung: RungResult) -> tuple[Cause, Candidate | None]:
    """The cause of a rung's first difference, and the candidate without it.

    The candidate is None where neither a repair nor the reference's own values can
    be put in place, so that nothing behind can be examined.
    """
    assert rung.first is not None
    site = ladder.site(comparison, rung.name, rung.first)
    attempts = list(_attempts(site, last_resort=False))
    if not any(_undoes(attempt, site.finding) for attempt in attempts):
        attempts += _attempts(site, last_resort=True)
    found = [attempt for attempt in attempts if _undoes(attempt, site.finding)]
    if not found:
        return _unknown(comparison, rung, site, attempts)
    if len({attempt.repair.cause for attempt in found}) > 1:
        found = [attempt for attempt in found if site.holds_further(attempt.variant.candidate)] or found
    best = found[0]
    if best.repair.is_seen:
        found = [attempt for attempt in found if attempt.repair.is_seen]
    candidate, others = _everywhere(comparison, rung, best)
    tied = dict.fromkeys(a.repair.cause for a in found if a.repair.cause != best.repair.cause)
    cause = Cause(
        name=best.repair.cause,
        rung=rung.name,
        tap=site.finding.tap,
        change=best.variant.change,
        advice=(best.variant.advice or best.repair.advice) + _scope(site, others),
        before=site.finding,
        after=best.after,
        proved=False,
        also_at=_elsewhere(others, site),
        tied=list(tied),
        residual=site.residual(),
    )
    return cause, _goes_on(comparison, site, candidate)


def _goes_on(comparison: Comparison, site: Site, repaired: Candidate | None) -> Candidate | None:
    """What the ladder is climbed with after a cause: a wrong export of a right candidate is no reason to change it."""
    export_alone = site.rung == bits.NAME and site.finding.where == "export" and comparison.source is not None
    return comparison.candidate if export_alone else repaired


def _attempts(site: Site, *, last_resort: bool) -> Iterator[_Attempt]:
    for repair in REPAIRS:
        if site.rung in repair.rungs and repair.last_resort == last_resort:
            yield from _tried(repair, site)


def _tried(repair: Repair, site: Site) -> Iterator[_Attempt]:
    for variant in repair.variants(site):
        # A change that does not fit this op is no explanation of it.
        with suppress(Unrunnable):
            yield _Attempt(repair, variant, site.measure(variant.candidate))


def _undoes(attempt: _Attempt, before: Finding) -> bool:
    after = attempt.after
    return after.ok and (bool(before.problem) or after.error <= FALLS * before.error)


def _unknown(
    comparison: Comparison, rung: RungResult, site: Site, attempts: Sequence[_Attempt]
) -> tuple[Cause, Candidate | None]:
    """With the reference's own in place of every op or parameter of this kind that differs."""
    nearest = sorted((a for a in attempts if not a.after.problem), key=lambda attempt: attempt.after.error)
    names = dict.fromkeys(attempt.repair.cause for attempt in nearest)
    candidate, others = site.substitute(), []
    for further in ladder.sites(comparison, rung.name, _alike(rung)):
        if candidate is not None:
            further = further.of(candidate)
            if _is_another(site, further) and _has_a_name(further):
                continue
            candidate = further.substitute()
            others.append(further.finding.tap)
    cause = Cause(
        name=UNKNOWN,
        rung=site.rung,
        tap=site.finding.tap,
        change="",
        advice="",
        before=site.finding,
        after=site.finding,
        proved=False,
        also_at=_elsewhere(others, site),
        runners_up=list(names)[:3],
        residual=site.residual(),
    )
    return cause, _goes_on(comparison, site, candidate)


def _is_another(site: Site, further: Site) -> bool:
    """The fault may be another one: of parameters always, of ops where the function is not the same."""
    if isinstance(site, OpSite) and isinstance(further, OpSite):
        return site.candidate.function(site.op) is not further.candidate.function(further.op)
    return site.rung == bits.NAME


def _has_a_name(site: Site) -> bool:
    return any(
        _undoes(a, site.finding) for last_resort in (False, True) for a in _attempts(site, last_resort=last_resort)
    )


def _alike(rung: RungResult) -> list[Finding]:
    """The first of each further tap at which the op of the rung's first difference differs.

    A wrong parameter may have any leaf: what swaps two layers swaps kernels, biases and norms.
    """
    first = rung.first
    assert first is not None
    same = [f for f in rung.findings if not f.ok and (f.op == first.op or rung.name == bits.NAME)]
    broken = {(f.tap, f.op): f for f in reversed(same)}
    return [broken[place] for place in reversed(broken) if place != (first.tap, first.op)]


def _scope(site: Site, others: Sequence[str]) -> str:
    """Where one layer alone holds a wrong parameter: what serves every layer is hardly to blame."""
    name, layers = site.finding.tap, site.candidate.config.num_hidden_layers
    path = name.split(".", 2)[2:] if name.startswith("layers.") and site.rung == bits.NAME else []
    if layers == 1 or not path or any(other != name and other.split(".", 2)[2:] == path for other in others):
        return ""
    return f"; of {layers} layers only this one has it, so look at its own tensor before a rule for all layers"


def _elsewhere(taps: Sequence[str], site: Site) -> list[str]:
    return [tap for tap in dict.fromkeys(taps) if tap != site.finding.tap]


def _everywhere(comparison: Comparison, rung: RungResult, best: _Attempt) -> tuple[Candidate, list[str]]:
    """The repair at every place of the rung that it helps, beginning with the first.

    A cause may be undone exactly at one place, and only be told by its look at the next.
    """
    candidate, others = best.variant.candidate, []
    same = [repair for repair in REPAIRS if repair.cause == best.repair.cause and rung.name in repair.rungs]
    for site in ladder.sites(comparison, rung.name, _alike(rung)):
        site, finding = site.of(candidate), site.finding
        if site.measure(candidate).ok:
            # Behind a wrong activation others were wrong as well, by no fault of their own.
            others += [] if rung.name in INHERITED else [finding.tap]
            continue
        helping = next((a for repair in same for a in _tried(repair, site) if _undoes(a, finding)), None)
        if helping is not None:
            candidate = helping.variant.candidate
            others.append(finding.tap)
    return candidate, others
