"""One tap of one cached step, measured again without the rest of the rung decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.taps import Op
from oracle import noise, residual
from oracle.candidate import Candidate, Unrunnable, right_padded
from oracle.compare import Window
from oracle.comparison import Comparison
from oracle.probe import Forced
from oracle.results import Finding, Residual
from oracle.rungs import decode
from oracle.rungs.decode import Sides
from oracle.site import Site


@dataclass(frozen=True)
class Call:
    """One cached forward of a candidate."""

    ids: np.ndarray
    counts: np.ndarray
    before: KVCache
    taps: dict[str, Any]
    after: KVCache


def calls(candidate: Candidate, forced: Forced, last: int) -> Iterator[Call]:
    """The prefill and the forced steps up to `last`, as the rung makes them.

    Raises:
        Unrunnable: see `Candidate.advance`.
    """
    counts = np.array([len(prompt) for prompt in forced.prompts], np.int32)
    ids, longest = right_padded(forced.prompts), int(counts.max())
    cache = candidate.empty_cache(len(counts), longest)
    for step in range(last + 1):
        cache = candidate.grown_cache(cache, longest + step)
        taps, after = candidate.advance(ids, counts, cache)
        yield Call(ids, counts, cache, taps, after)
        if step < last:
            cache, ids, counts = after, forced.ids[step][:, None], np.ones_like(counts)


@dataclass(frozen=True)
class Expected:
    """What a tap ought to be in one step."""

    window: Window
    versions: Sequence[Sequence[np.ndarray]]
    """Rows of truth, peer and echoes."""
    allowed: Sequence[np.ndarray] | None


@dataclass(frozen=True)
class DecodeSite(Site):
    """A tap that differs in a cached step."""

    op: Op
    forced: Forced
    expected: Sequence[Expected]
    """Of the prefill and every step up to the one that differs."""

    @property
    def last(self) -> int:
        """The step that differs; 0 is the prefill."""
        return len(self.expected) - 1

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`: the first step at which the tap differs, or the one of the finding."""
        judge, unit = self.comparison.judge(decode.NAME), noise.Unit()
        finding = self.finding
        for call, expected in zip(calls(candidate, self.forced, self.last), self.expected, strict=True):
            array = np.asarray(call.taps[self.op.tap])
            if self.op.function == "attention_mask" and not expected.window.padding_is_hidden(array):
                return replace(self.finding, ok=False)
            rows = expected.window.rows(self.op.tap, array)
            truth, peer, *echoes = expected.versions
            finding = judge.finding(
                self.op,
                rows,
                truth,
                peer,
                allowed=expected.allowed,
                where=self.finding.where,
                unit=unit,
                echoes=echoes,
            )
            if not finding.ok:
                break
        return finding

    def residual(self) -> Residual | None:
        """See `Site.residual`: of the row that is furthest off."""
        try:
            *_, call = calls(self.candidate, self.forced, self.last)
        except Unrunnable:
            return None
        ours = self.expected[-1].window.rows(self.op.tap, np.asarray(call.taps[self.op.tap]))
        pairs = [(a, b) for a, b in zip(ours, self.expected[-1].versions[0], strict=True) if a.shape == b.shape]
        if not pairs:
            return None
        a, b = max(pairs, key=lambda pair: float(np.abs(pair[0].astype(np.float64) - pair[1]).max(initial=0)))
        return residual.describe(self.op.tap, a[None], b[None])

    def substitute(self) -> Candidate | None:
        """The candidate with the model's own step."""
        own = self.candidate.step is model.forward_cached
        return None if own else replace(self.candidate, step=model.forward_cached)


def site(comparison: Comparison, finding: Finding) -> Site:
    """The tap and step of a finding; of greedy tokens, the whole rung."""
    forced, step = _place(comparison, finding)
    if forced is None or step is None:
        return Site(comparison, decode.NAME, finding)
    lengths = np.array([len(prompt) for prompt in forced.prompts], np.int32)
    reference, judge = comparison.reference, comparison.judge(decode.NAME)
    sides = Sides(comparison.candidate, judge, lengths, reference.truth, reference.peer)
    op = next((op for op in sides.ops if op.tap == finding.tap), None)
    expected = [_expected(sides, op, number, forced) for number in range(step + 1)] if op else []
    if op is None or None in expected:
        return Site(comparison, decode.NAME, finding)
    return DecodeSite(comparison, decode.NAME, finding, op, forced, [each for each in expected if each])


def _expected(sides: Sides, op: Op, step: int, forced: Forced) -> Expected | None:
    versions = sides.advance(step, forced)
    if any(op.tap not in taps for taps in versions):
        return None
    ours, theirs = sides.windows(step)
    allowed = theirs.rows("mask", versions[0]["mask"]) if op.function == "mask" else None
    return Expected(ours, [theirs.rows(op.tap, taps[op.tap]) for taps in versions], allowed)


def _place(comparison: Comparison, finding: Finding) -> tuple[Forced | None, int | None]:
    *label, step = finding.where.split(", ")
    forced = [each for each in comparison.decoding().forced if each.label == ", ".join(label)]
    if not forced or not (step == "prefill" or step.startswith("step ")):
        return None, None
    return forced[0], 0 if step == "prefill" else int(step.removeprefix("step "))
