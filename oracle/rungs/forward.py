"""Rung forward: both models run freely on the same ids, every tap compared, then the KL of the logits."""

from collections.abc import Sequence
from contextlib import ExitStack, closing

import numpy as np

from jaxgpt.taps import Op, ops
from oracle import noise
from oracle.candidate import Candidate
from oracle.compare import Judge
from oracle.probe import Probe
from oracle.reference import Reference, to_numpy
from oracle.results import Finding, RungResult
from oracle.streaming import Reader

NAME = "forward"


def run(candidate: Candidate, reference: Reference, probe: Probe, judge: Judge) -> RungResult:
    """One finding per tap in execution order, then the logits' KL, then taps the candidate lacks."""
    taps = candidate.forward(probe.ids, probe.positions, probe.segments)
    findings: list[Finding] = []
    allowed: list[np.ndarray] = []
    with ExitStack() as stack:
        streams = [reference.truth.stream(probe), *reference.draws(probe)]
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
            if op.tap == "logits":
                findings.append(kl_finding(*versions, judge=judge))
        findings += [judge.missing(Op(tap, "", ()), "candidate") for tap in truth.rest()]
    return RungResult(NAME, findings, _summary(findings))


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


def _summary(findings: list[Finding]) -> str:
    kl = next((finding.error for finding in findings if finding.op == "kl"), float("nan"))
    broken = sum(not finding.ok for finding in findings)
    return f"{len(findings)} comparisons of free-running taps, {broken} beyond noise; max KL per token {kl:.1e} nats"
