"""Rung operators: each op of each layer on the reference's own inputs.

The inputs of an op are the reference's activations, cast to the dtype in which the
candidate holds them; truth is the reference's op in float64 on exactly those cast
values, with the same cast parameters. So a difference is the op's own, whatever
came before it.
"""

from contextlib import closing

import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.ops import MASKED
from jaxgpt.taps import INPUTS, Op, ops
from oracle.candidate import Candidate, Unrunnable
from oracle.compare import HIDDEN, Judge
from oracle.probe import Probe
from oracle.reference import Reference
from oracle.results import Finding, RungResult
from oracle.streaming import Reader

NAME = "operators"

SMALL_ROWS = 16
"""Norms also see their rows scaled by 1, 1/2, … 2^−15: there the epsilon decides."""


def run(candidate: Candidate, reference: Reference, probe: Probe, judge: Judge) -> RungResult:
    """One finding per op in execution order (norms: two), then one per tap the candidate lacks."""
    findings: list[Finding] = []
    with closing(reference.truth.stream(probe)) as items:
        reader = Reader(items)
        local = _Local(candidate, reference, probe, judge)
        for op in local.ops:
            findings += local.findings(op, reader)
        findings += [judge.missing(Op(tap, "", ()), "candidate") for tap in reader.rest()]
    broken = sum(not finding.ok for finding in findings)
    worst = max((finding.noise for finding in findings if finding.ok), default=0.0)
    summary = f"{len(findings)} ops on the reference's inputs, {broken} broken; the others within {worst:.2g}x noise"
    return RungResult(NAME, findings, summary)


class _Local:
    """The walk over the ops: holds the reference's activations for as long as an op needs them."""

    def __init__(self, candidate: Candidate, reference: Reference, probe: Probe, judge: Judge):
        self.candidate, self.reference, self.judge = candidate, reference, judge
        self.ops = ops(candidate.config)
        given = model.uncached_inputs(*map(jnp.asarray, (probe.ids, probe.positions, probe.segments)))
        self.values = {name: np.asarray(value) for name, value in given.items()}
        self.last_use = {name: op.tap for op in self.ops for name in op.inputs}

    def findings(self, op: Op, reader: Reader) -> list[Finding]:
        """Compare one op, then hold the reference's output for the ops after it."""
        truth = reader.take(op.tap)
        if truth is None:
            return [self.judge.missing(op, "reference")]
        lacking = [name for name in op.inputs if name not in self.values]
        if lacking:
            problem = f"not compared: the reference has no {lacking[0]} to feed it with"
            return [Finding(op.tap, op.function, ok=False, problem=problem)]
        inputs = [self.values[name] for name in op.inputs]
        findings, dtype = self.compare(op, inputs)
        if op.function == "norm":
            findings += self.compare(op, [_small_rows(inputs[0])], where="small rows")[0]
        self.values[op.tap] = _cast(op, truth.numpy(), dtype)
        for name in op.inputs:
            if self.last_use[name] == op.tap and name not in INPUTS:
                self.values.pop(name, None)
        return findings

    def compare(self, op: Op, inputs: list[np.ndarray], where: str = "") -> tuple[list[Finding], np.dtype]:
        """Candidate, truth and peer on the same inputs; the dtype in which the candidate answers."""
        truth = self.reference.truth.run_op(op, inputs)
        peer = self.reference.peer.run_op(op, inputs)
        try:
            ours = np.asarray(self.candidate.run_op(op, inputs))
        except Unrunnable as error:
            finding = Finding(op.tap, op.function, ok=False, where=where, problem=str(error))
            return [finding], np.dtype(self.candidate.dtype)
        allowed = [inputs[1]] if op.function == "mask" else None
        finding = self.judge.finding(op, [ours], [truth], [peer], allowed=allowed, where=where)
        return [finding], ours.dtype


def _cast(op: Op, truth: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A reference activation in the dtype and with the mask value of the candidate."""
    if op.function == "mask":
        truth = np.where(truth < HIDDEN, MASKED, truth)
    return truth if truth.dtype == np.bool_ else truth.astype(dtype)


def _small_rows(x: np.ndarray) -> np.ndarray:
    powers = np.exp2(-(np.arange(x.shape[1]) % SMALL_ROWS)).astype(np.float32)
    return (x.astype(np.float32) * powers[None, :, None]).astype(x.dtype)
