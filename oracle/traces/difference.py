"""Where two recordings part: every pair of taps in execution order, neither framework needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracle import residual
from oracle.results import UNKNOWN, Cause, Finding, Report, Residual, RungResult
from oracle.traces import align, layout
from oracle.traces.align import Alignment, Pair, Suggestion
from oracle.traces.judge import Judge, check_truth
from oracle.traces.name_map import Rule
from oracle.traces.recorder import MATMULS, REDUCED
from oracle.traces.trace import EXACT_KINDS, Trace, epsilon

NAME = "traces"
"""Of the one rung in the report."""


@dataclass(frozen=True)
class Difference:
    """What a comparison of two traces says."""

    report: Report
    alignment: Alignment
    suggestions: Sequence[Suggestion]
    """For taps that have no partner; lines for a map file, never used by themselves."""
    unit: str
    """What the findings' ratios are multiples of."""
    measured_by: str
    notes: Sequence[str]
    """What a reader should know about the recordings."""

    @property
    def first(self) -> Finding | None:
        """The first pair that differs."""
        return next((finding for finding in self.pairs if not finding.ok), None)

    @property
    def pairs(self) -> Sequence[Finding]:
        """The findings of taps that both sides have, in the order of A."""
        return self.report.rungs[0].findings[: len(self.alignment.pairs)]

    def before_first(self) -> tuple[int, int]:
        """In front of the first difference: how many pairs agree, how many of A's taps have no partner."""
        found = self.first
        if found is None:
            return len(self.pairs), len(self.alignment.only_a)
        agree = next(i for i, finding in enumerate(self.pairs) if finding is found)
        earlier = self.alignment.order[: self.alignment.order.index(found.tap)]
        return agree, len(set(earlier).intersection(self.alignment.only_a))

    @property
    def missing(self) -> Sequence[Finding]:
        """The findings of taps that one side lacks."""
        return self.report.rungs[0].findings[len(self.pairs) :]

    def to_dict(self) -> dict[str, Any]:
        """The JSON report, with what is particular to traces under `traces`."""
        pairs = [[pair.a, pair.b, str(pair.layout) if pair.layout else ""] for pair in self.alignment.pairs]
        suggestions = [{"rule": found.rule(), "correlation": found.correlation} for found in self.suggestions]
        own = {"measured_by": self.measured_by, "pairs": pairs, "suggestions": suggestions, "notes": list(self.notes)}
        return {**self.report.to_dict(), "traces": own}


def diff(
    a: Trace, b: Trace, rules: Sequence[Rule] = (), *, truth: Trace | None = None, repetition: Trace | None = None
) -> Difference:
    """Compare B with A, the reference.

    Args:
        rules: how A's names and axes become B's.
        truth: a float64 recording of A's model on the same inputs.
        repetition: another recording of A on the same inputs.

    Raises:
        InputError: rules that do not fit, or a truth that is none.
    """
    if truth is not None:
        check_truth(truth, a)
    judge = Judge(truth, repetition)
    alignment = align.align(list(a.taps), list(b.taps), rules, list(b.left_out))
    suggestions = align.suggest(a.taps, b.taps, alignment.only_a, alignment.only_b)
    others = {"B": b, "the truth": truth, "the repetition": repetition}
    problem = _unsound(a, others, alignment, measured=truth is not None or repetition is not None)
    findings = [] if problem else [*_compare(a, b, alignment, judge), *_missing(a, b, alignment)]
    rung = RungResult(NAME, findings, _summary(findings, alignment), inconclusive=problem)
    first = next((finding for finding in findings[: len(alignment.pairs)] if not finding.ok), None)
    causes = [] if first is None else [_unknown(first, _residual(a, b, alignment, first))]
    measured_by = judge.describe([unit for trace in (a, b) for unit in _coarsest_so_far(trace).values()])
    environment = {"A": dict(a.environment), "B": dict(b.environment), "measured_by": measured_by}
    report = Report([rung], exposed=(), hidden={}, environment=environment, causes=causes)
    return Difference(report, alignment, suggestions, judge.unit, measured_by, list(_notes(a, b, alignment)))


# -- May they be compared? ---------------------------------------------------------------


def _unsound(a: Trace, others: Mapping[str, Trace | None], alignment: Alignment, *, measured: bool) -> str:
    """Why a comparison would mean nothing; empty if it means something."""
    for name, other in others.items():
        problem = "" if other is None else _inputs_problem(a.inputs, other.inputs, name)
        if problem:
            return problem
    b = others["B"]
    assert b is not None
    if not alignment.pairs:
        return "no tap of A has a partner in B; say with --map which is which"
    for name, trace in (("A", a), ("B", b)):
        if trace.environment.get(MATMULS) == REDUCED and not measured:
            return (
                f"{name} was recorded with float32 matrix products at reduced precision; record again at the highest, "
                "or give --truth or --noise, which measure what it costs"
            )
    return ""


def _inputs_problem(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], whose: str) -> str:
    if not a or not b:
        return ""
    # Frameworks name arguments differently; their order is the same.
    pairs = zip(a, a, strict=True) if a.keys() == b.keys() else zip(a, b, strict=False)
    if len(a) != len(b):
        return f"A had {len(a)} inputs and {whose} {len(b)}; record both on the same inputs"
    for ours, theirs in pairs:
        if not _same_input(a[ours], b[theirs]):
            return f"the input {ours} of A differs from {theirs} of {whose}; record both on the same inputs"
    return ""


def _same_input(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the rounding of the coarser dtype, in some layout."""
    exact = a.dtype.kind in EXACT_KINDS and b.dtype.kind in EXACT_KINDS
    tolerance = 0.0 if exact else max(epsilon(a.dtype), epsilon(b.dtype))
    wide = a.astype(np.float64) if not exact else a
    for pattern in layout.possible(b.shape, a.shape):
        fitted = pattern.fit(b.shape, a.shape)
        assert fitted is not None
        other = fitted.apply(b.astype(wide.dtype))
        if np.allclose(wide, other, rtol=tolerance, atol=0.0, equal_nan=True):
            return True
    return False


# -- Comparing ---------------------------------------------------------------------------


def _compare(a: Trace, b: Trace, alignment: Alignment, judge: Judge) -> Iterator[Finding]:
    coarsest = [_coarsest_so_far(trace) for trace in (a, b)]
    for pair in alignment.pairs:
        where = "" if pair.a == pair.b else f"{pair.b} of B"
        ours = _laid_out(pair, a, b)
        if ours is None:
            shapes = f"{list(b.taps[pair.b].shape)} in B, {list(a.taps[pair.a].shape)} in A"
            problem = f"shape {shapes}, which the layout {pair.layout} does not take to each other"
            yield Finding(pair.a, "", ok=False, where=where, problem=problem)
            continue
        unit = max(coarsest[0][pair.a], coarsest[1][pair.b])
        yield judge.finding(pair.a, a.taps[pair.a], ours, unit, where)


def _laid_out(pair: Pair, a: Trace, b: Trace) -> np.ndarray | None:
    """B's tap with the axes of A's; None where the map's layout does not fit."""
    array = b.taps[pair.b]
    if pair.layout is None:
        return array
    fitted = pair.layout.fit(array.shape, a.taps[pair.a].shape)
    return None if fitted is None else fitted.apply(array)


def _coarsest_so_far(trace: Trace) -> dict[str, float]:
    coarsest = max((epsilon(array.dtype) for array in trace.inputs.values()), default=0.0)
    found: dict[str, float] = {}
    for name, array in trace.taps.items():
        coarsest = found[name] = max(coarsest, epsilon(array.dtype))
    return found


def _missing(a: Trace, b: Trace, alignment: Alignment) -> Iterator[Finding]:
    for side, names, other in (("B", alignment.only_a, b), ("A", alignment.only_b, a)):
        for name in names:
            asked = alignment.wanted.get(name) if side == "B" else None
            reason = other.left_out.get(asked or name)
            problem = f"{side} has no {asked or 'such tap'}" + (f" ({reason} while recording)" if reason else "")
            yield Finding(name, "", ok=False, problem=problem)


def _summary(findings: Sequence[Finding], alignment: Alignment) -> str:
    compared = len(alignment.pairs)
    broken = sum(not finding.ok for finding in findings[:compared])
    missing = len(alignment.only_a) + len(alignment.only_b)
    return f"{compared} pairs of taps compared, {broken} beyond noise; {missing} taps without a partner"


def _residual(a: Trace, b: Trace, alignment: Alignment, first: Finding) -> Residual | None:
    pair = next(pair for pair in alignment.pairs if pair.a == first.tap)
    ours, truth = _laid_out(pair, a, b), a.taps[pair.a]
    if ours is None or truth.dtype.kind in EXACT_KINDS or ours.dtype.kind in EXACT_KINDS:
        return None
    # A foreign tap may be called like one of ours and have other axes.
    known = len(residual.axis_names(pair.a, truth.ndim)) == truth.ndim
    return residual.describe(pair.a if known else "", ours, truth)


def _unknown(first: Finding, structure: Residual | None) -> Cause:
    """Recordings cannot be repaired and run again: what is known is where it begins and what it looks like."""
    advice = "compare what computes this tap in the two programs; those before it agree"
    return Cause(UNKNOWN, NAME, first.tap, "", advice, first, first, proved=False, residual=structure)


def _notes(a: Trace, b: Trace, alignment: Alignment) -> Iterator[str]:
    if not a.inputs or not b.inputs:
        yield "the inputs were not recorded on both sides, so that nobody checked that they are the same"
    for name, trace in (("A", a), ("B", b)):
        if trace.environment.get("training") == "yes":
            yield f"{name} was recorded in training mode: dropout and batch statistics are on"
    for pair in alignment.pairs:
        dtypes = a.taps[pair.a].dtype, b.taps[pair.b].dtype
        if dtypes[0] != dtypes[1] and all(epsilon(dtype) for dtype in dtypes):
            yield f"from {pair.a} on, B holds {dtypes[1]} where A holds {dtypes[0]}; the coarser sets the noise"
            break
    if alignment.waived:
        yield f"{len(alignment.waived)} taps have no partner because the map says so"
