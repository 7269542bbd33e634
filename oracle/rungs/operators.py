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
from oracle.candidate import Candidate
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
        self.dtypes = candidate.dtypes(probe.ids)
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
        findings = [self.compare(op, inputs)]
        if op.function == "norm":
            findings.append(self.compare(op, [_small_rows(inputs[0])], where="small rows"))
        self.values[op.tap] = self.cast(op.tap, truth.numpy())
        for name in op.inputs:
            if self.last_use[name] == op.tap and name not in INPUTS:
                self.values.pop(name, None)
        return findings

    def compare(self, op: Op, inputs: list[np.ndarray], where: str = "") -> Finding:
        """Candidate, truth and peer on the same inputs."""
        truth = self.reference.truth.run_op(op, inputs)
        peer = self.reference.peer.run_op(op, inputs)
        try:
            ours = np.asarray(self.candidate.run_op(op, inputs))
        except (TypeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            problem = f"the op cannot take the reference's inputs: {reason}"
            return Finding(op.tap, op.function, ok=False, where=where, problem=problem)
        allowed = [inputs[1]] if op.function == "mask" else None
        dtype = str(self.dtypes[op.tap])
        return self.judge.finding(op, [ours], [truth], [peer], allowed=allowed, where=where, epsilon=dtype)

    def cast(self, tap: str, truth: np.ndarray) -> np.ndarray:
        """A reference activation in the dtype and with the mask value of the candidate."""
        if truth.dtype == np.bool_:
            return truth
        if tap.endswith("attn.masked"):
            truth = np.where(truth < HIDDEN, MASKED, truth)
        return truth.astype(self.dtypes[tap])


def _small_rows(x: np.ndarray) -> np.ndarray:
    powers = np.exp2(-(np.arange(x.shape[1]) % SMALL_ROWS)).astype(np.float32)
    return (x.astype(np.float32) * powers[None, :, None]).astype(x.dtype)
