"""The place where a difference begins, at which changed candidates can be measured again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import Finding, Residual

Found = TypeVar("Found")


@dataclass(frozen=True)
class Site:
    """One broken finding of one rung. Rungs offer subclasses that measure it alone and fast."""

    comparison: Comparison
    rung: str
    finding: Finding

    @property
    def candidate(self) -> Candidate:
        """The candidate as it is."""
        return self.comparison.candidate

    def once(self, work: Callable[[Any], Found]) -> Found:
        """A function of this site, computed when it is first asked for: several repairs look at the same thing."""
        known = self.__dict__.setdefault("_known", {})
        if work not in known:
            known[work] = work(self)
        return known[work]

    def of(self, candidate: Candidate) -> Self:
        """The same place in another candidate."""
        return replace(self, comparison=replace(self.comparison, candidate=candidate))

    def measure(self, candidate: Candidate) -> Finding:
        """The same comparison with another candidate: here, the first broken finding of the whole rung.

        A finding that was broken counts as repaired only if nothing before it breaks.
        """
        from oracle.ladder import run_rung  # the ladder imports the rungs, which import this

        result = run_rung(self.rung, replace(self.comparison, candidate=candidate))
        at = next((place for place, finding in enumerate(result.findings) if self._is_here(finding)), None)
        if at is None:
            return replace(self.finding, problem="no longer compared")
        broken_before = next((finding for finding in result.findings[:at] if not finding.ok), None)
        return broken_before or result.findings[at]

    def _is_here(self, finding: Finding) -> bool:
        # A tap that the candidate lacks has no op.
        key = self.finding.op, self.finding.where
        return finding.tap == self.finding.tap and (not key[0] or (finding.op, finding.where) == key)

    def holds_further(self, candidate: Candidate) -> bool:
        """Whether a change that undoes the difference also holds where more can be asked: tells apart what is tied."""
        return True

    def residual(self) -> Residual | None:
        """What the difference looks like, where it is one of tensors."""
        return None

    def substitute(self) -> Candidate | None:
        """The candidate with the reference's own at this place, to see what lies behind; None if there is no such."""
        return None
