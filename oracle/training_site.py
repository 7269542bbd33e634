"""Where a difference of training begins: the rung is run again, once for each candidate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from oracle import lesson
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import Finding, RungResult
from oracle.rungs import loss
from oracle.site import Site
from oracle.training import Training

Key = tuple[str, str, str]


@dataclass(frozen=True)
class _Question:
    """A rung of a comparison, told apart by what it is made of and not by equality of arrays."""

    rung: str
    comparison: Comparison
    batches_only: bool

    @property
    def _identity(self) -> tuple[Any, ...]:
        c = self.comparison
        return self.rung, self.batches_only, id(c.candidate), id(c.reference), id(c.calibration), c.seed

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self._identity == other._identity


@lru_cache(maxsize=4)
def _answer(question: _Question) -> RungResult:
    from oracle.ladder import run_rung  # the ladder imports the sites, which import this

    if not question.batches_only:
        return run_rung(question.rung, question.comparison)
    asked = lesson.whole(question.comparison)
    return RungResult(question.rung, loss.batch_findings(asked, lesson.micro_batches(asked)), "")


@dataclass(frozen=True)
class TrainingSite(Site):
    """A finding of a training rung."""

    def result(self, candidate: Candidate) -> RungResult:
        """The rung with another candidate; only the batches, where the difference is one of them."""
        comparison = replace(self.comparison, candidate=candidate)
        return _answer(_Question(self.rung, comparison, self.finding.tap.startswith(loss.BATCH)))

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`; nothing that was right may become wrong."""
        right = {_key(finding) for finding in self.result(self.candidate).findings if finding.ok}
        findings = self.result(candidate).findings
        spoilt = next((finding for finding in findings if not finding.ok and _key(finding) in right), None)
        same = [finding for finding in findings if _key(finding)[:2] == _key(self.finding)[:2]]
        return spoilt or self._same(same)

    def _same(self, findings: list[Finding]) -> Finding:
        """The finding at this place; of a batch's array the place moves with the first entry that differs."""
        if self.finding.tap.startswith(loss.BATCH):
            findings = [replace(finding, where=self.finding.where) for finding in findings]
        missing = replace(self.finding, problem="no longer compared")
        return next((finding for finding in findings if finding.where == self.finding.where), missing)

    def substitute(self) -> Candidate | None:
        """See `Site.substitute`: the reference's batches; the rest of training has no part that could be exchanged."""
        if not self.finding.tap.startswith(loss.BATCH):
            return None
        asked = lesson.whole(self.comparison)
        batches = [lesson.as_product(batch) for batch in lesson.micro_batches(asked)]
        return trained(self.candidate, batches=lambda _corpus, _settings: batches)

    def holds_further(self, candidate: Candidate) -> bool:
        """See `Site.holds_further`: several changes may hit a mean, which is one number, and only one its gradient."""
        if self.finding.tap != loss.MEAN:
            return True
        comparison = replace(self.comparison, candidate=candidate)
        return _answer(_Question("gradients", comparison, batches_only=False)).verdict == "pass"

    def wrong_functions(self) -> tuple[str, ...]:
        """Which of the candidate's functions give the wrong loss: a change is made to those only."""
        return self.once(_wrong_functions)


def trained(candidate: Candidate, **changes: Any) -> Candidate:
    """The candidate with another way of training."""
    training: Training = replace(candidate.training, **changes)
    return replace(candidate, training=training)


def _key(finding: Finding) -> Key:
    return finding.tap, finding.op, finding.where


WRONG = 1e-4
"""Relative error of the loss and the gradient's norm that a step reports, beyond which they are not the agreed ones."""


def _wrong_functions(site: TrainingSite) -> tuple[str, ...]:
    if site.rung == "optimizer":
        return ("step",)
    broken = {finding.tap for finding in site.result(site.candidate).findings if not finding.ok}
    wrong = ["losses"] if loss.TOKENS in broken else []
    if site.rung == "gradients" or loss.MEAN in broken:
        wrong.append("gradients")
    if not _reports_what_was_agreed(site):
        wrong.append("step")
    return tuple(wrong)


def _reports_what_was_agreed(site: TrainingSite) -> bool:
    """Of the first step: its loss, and the norm of its gradient."""
    asked = lesson.part(site.comparison)
    course = lesson.course_of(site.comparison)
    ((_, report),) = asked.steps(lesson.groups(asked), course.clip_norm, 1)
    truth = course.truth[0].report
    pairs = (report.loss, truth.loss), (report.grad_norm, truth.grad_norm)
    return all(abs(float(told) - true) <= WRONG * true for told, true in pairs)


def of(rung: str) -> Callable[[Comparison, Finding], Site]:
    """The places of one training rung."""
    return lambda comparison, finding: TrainingSite(comparison, rung, finding)
