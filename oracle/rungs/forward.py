"""Rung forward: both models run freely on the same ids, every tap compared, then the KL of the logits.

Where all of them agree, the configs are compared: what no op reads, and what rounding hides.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxgpt import model
from jaxgpt.taps import Op, ops
from oracle import config_fields, memory, noise, residual
from oracle.candidate import Candidate, Unrunnable
from oracle.compare import Judge
from oracle.comparison import Comparison
from oracle.echo import ALL, ECHOES, leave_a_doubt
from oracle.probe import Probe
from oracle.reference import Reference, to_numpy
from oracle.results import CONFIG_FIELD, Finding, Residual, RungResult
from oracle.site import Site
from oracle.streaming import Reader
from oracle.training_probe import is_large

NAME = "forward"
MAX_KL = "largest KL per token in nats"
DOUBTFUL = 1.5
"""Multiples of the noise from which more draws are made of it: sooner than elsewhere, since one forward is cheap and
an error that one number of one layer carries is in every tap behind it. Not of a large model: its logits alone
would fill the memory."""


def run(comparison: Comparison) -> RungResult:
    """One finding per tap in execution order, the logits' KL, taps the candidate lacks; config fields that differ."""
    candidate, reference = comparison.candidate, comparison.reference
    probe, judge = comparison.sequences(), comparison.judge(NAME)
    findings = _findings(candidate, reference, probe, judge, range(ECHOES))
    if leave_a_doubt(findings, DOUBTFUL) and not is_large(candidate.config):
        findings = _findings(candidate, reference, probe, judge, ALL)
    kl = next((finding.error for finding in findings if finding.op == "kl"), float("nan"))
    summary = _summary(findings, kl)
    if all(finding.ok for finding in findings):
        unlike = config_fields.findings(comparison)
        findings += unlike
        summary += f"; {len(unlike)} config fields differ" if unlike else ""
    return RungResult(NAME, findings, summary, figures={MAX_KL: kl})


def _findings(
    candidate: Candidate, reference: Reference, probe: Probe, judge: Judge, echoes: Iterable[int]
) -> list[Finding]:
    taps = candidate.forward(probe.ids, probe.positions, probe.segments)
    findings: list[Finding] = []
    allowed: list[np.ndarray] = []
    with ExitStack() as stack:
        streams = [reference.truth.stream(probe), *reference.draws(probe, echoes)]
        truth, *draws = [Reader(stack.enter_context(closing(items))) for items in streams]
        for op in ops(candidate.config):
            theirs = [reader.take(op.tap) for reader in (truth, *draws)]
            if any(value is None for value in theirs):
                findings.append(judge.missing(op, "reference"))
                continue
            versions = [np.asarray(taps.pop(op.tap)), *(to_numpy(value) for value in theirs if value is not None)]
            if op.function == "attention_mask":
                allowed = [versions[1]]
            findings.append(_finding(op, versions, allowed, judge))
            if op.tap.endswith("mlp_residual"):
                memory.release()  # what a layer held, before the logits are wanted
            if op.tap == "logits":
                findings.append(kl_finding(*versions, judge=judge))
        findings += [judge.missing(Op(tap, "", ()), "candidate") for tap in truth.rest()]
    return findings


def _finding(op: Op, versions: Sequence[np.ndarray], allowed: list[np.ndarray], judge: Judge) -> Finding:
    ours, truth, peer, *echoes = ([version] for version in versions)
    masked = allowed if op.function == "mask" else None
    return judge.finding(op, ours, truth, peer, allowed=masked, echoes=echoes)


def kl_finding(ours: np.ndarray, truth: np.ndarray, *peers: np.ndarray, judge: Judge) -> Finding:
    """Per-token KL(truth ‖ candidate); its `error` is the largest, in nats."""
    if any(other.shape != truth.shape for other in (ours, *peers)):
        return Finding("logits", "kl", ok=False, problem="not computed: the shapes differ")
    measured, _ = noise.kl_ratios([(ours, truth, *peers)], noise.EPSILON[judge.dtype])
    return judge.of("logits", "kl", measured, where="KL per token")


def _summary(findings: list[Finding], kl: float) -> str:
    broken = sum(not finding.ok for finding in findings)
    return f"{len(findings)} comparisons of free-running taps, {broken} beyond noise; max KL per token {kl:.1e} nats"


# -- One tap ---------------------------------------------------------------------------


@dataclass
class Forwards:
    """Forwards on one probe; the last candidate's taps are kept."""

    probe: Probe
    _of: Candidate | None = None
    _taps: dict[str, Any] = field(default_factory=dict)

    def taps(self, candidate: Candidate) -> dict[str, Any]:
        """All taps.

        Raises:
            Unrunnable: see `Candidate.forward`.
        """
        if self._of is not candidate:
            self._taps = candidate.forward(self.probe.ids, self.probe.positions, self.probe.segments)
            self._of = candidate
        return self._taps


@dataclass(frozen=True)
class ForwardSite(Site):
    """A tap that differs in a free-running forward though its op, alone, is right."""

    op: Op
    forwards: Forwards
    truth: np.ndarray
    peers: Sequence[np.ndarray]
    """The peer's tap, then the echoes'."""
    allowed: Sequence[np.ndarray]

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`."""
        ours = np.asarray(self.forwards.taps(candidate)[self.op.tap])
        versions = [ours, self.truth, *self.peers]
        return _finding(self.op, versions, list(self.allowed), self.comparison.judge(NAME))

    def residual(self) -> Residual | None:
        """See `Site.residual`."""
        try:
            ours = np.asarray(self.forwards.taps(self.candidate)[self.op.tap])
        except Unrunnable:
            return None
        return residual.describe(self.op.tap, ours, self.truth)

    def substitute(self) -> Candidate | None:
        """The candidate with the model's own forward pass."""
        own = self.candidate.forward_pass is model.forward
        return None if own else replace(self.candidate, forward_pass=model.forward)


def site(comparison: Comparison, finding: Finding) -> Site:
    """The tap, or the config field, of a finding."""
    if finding.tap.startswith(CONFIG_FIELD):
        return config_fields.ConfigSite(comparison, NAME, finding)
    return next(sites(comparison, [finding]), Site(comparison, NAME, finding))


def sites(comparison: Comparison, findings: Sequence[Finding]) -> Iterator[Site]:
    """The taps of some findings, in execution order, in one forward of each reference."""
    wanted = {finding.tap: finding for finding in findings if finding.op != "kl"}
    probe, reference = comparison.sequences(), comparison.reference
    forwards, allowed = Forwards(probe), list[np.ndarray]()
    with ExitStack() as stack:
        numbers = range(ECHOES) if is_large(comparison.candidate.config) else ALL
        streams = [reference.truth.stream(probe), *reference.draws(probe, numbers)]
        readers = [Reader(stack.enter_context(closing(items))) for items in streams]
        for op in ops(comparison.candidate.config):
            theirs = [to_numpy(value) for value in (reader.take(op.tap) for reader in readers) if value is not None]
            if op.function == "attention_mask":
                allowed = theirs[:1]
            finding = wanted.pop(op.tap, None)
            if finding is not None and len(theirs) == len(readers):
                yield ForwardSite(comparison, NAME, finding, op, forwards, theirs[0], theirs[1:], allowed)
            if not wanted:
                return
