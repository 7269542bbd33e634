"""Rung operators: each op of each layer on the reference's own inputs.

The inputs of an op are the reference's activations, cast to the dtype in which the
candidate holds them; truth is the reference's op in float64 on exactly those cast
values, with the same cast parameters. So a difference is the op's own, whatever
came before it.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, MASKED, Leaves, OpFunction
from jaxgpt.taps import INPUTS, Op, ops
from oracle import residual
from oracle.candidate import Candidate, Unrunnable
from oracle.compare import HIDDEN, Judge
from oracle.comparison import Comparison
from oracle.probe import Probe
from oracle.reference import Reference
from oracle.results import Finding, Residual, RungResult
from oracle.site import Site
from oracle.streaming import Reader

NAME = "operators"

SMALL = "small rows"
SMALL_ROWS = 16
"""Norms also see their rows scaled by 1, 1/2, … 2^−15: there the epsilon decides."""


def run(candidate: Candidate, reference: Reference, probe: Probe, judge: Judge) -> RungResult:
    """One finding per op in execution order (norms: two), then one per tap the candidate lacks."""
    findings: list[Finding] = []
    with closing(reference.truth.stream(probe)) as items:
        reader = Reader(items)
        local = Walk(candidate, reference, probe, judge)
        for op in local.ops:
            findings += local.findings(op, reader)
        findings += [judge.missing(Op(tap, "", ()), "candidate") for tap in reader.rest()]
    broken = sum(not finding.ok for finding in findings)
    worst = max((finding.noise for finding in findings if finding.ok), default=0.0)
    summary = f"{len(findings)} ops on the reference's inputs, {broken} broken; the others within {worst:.2g}x noise"
    return RungResult(NAME, findings, summary)


class Walk:
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
            findings += self.compare(op, [_small_rows(inputs[0])], where=SMALL)[0]
        self.values[op.tap] = _cast(op, truth.numpy(), dtype)
        for name in op.inputs:
            if self.last_use[name] == op.tap and name not in INPUTS:
                self.values.pop(name, None)
        return findings

    def compare(self, op: Op, inputs: list[np.ndarray], where: str = "") -> tuple[list[Finding], np.dtype]:
        """Candidate, truth and peer on the same inputs; the dtype in which the candidate answers."""
        truth = self.reference.truth.run_op(op, inputs)
        peer = self.reference.peer.run_op(op, inputs)
        return measure(self.candidate, op, inputs, truth, peer, self.judge, where)


def measure(
    candidate: Candidate,
    op: Op,
    inputs: list[np.ndarray],
    truth: np.ndarray,
    peer: np.ndarray,
    judge: Judge,
    where: str,
) -> tuple[list[Finding], np.dtype]:
    """The candidate's op on given inputs against truth and peer; the dtype in which it answers."""
    try:
        ours = np.asarray(candidate.run_op(op, inputs))
    except Unrunnable as error:
        finding = Finding(op.tap, op.function, ok=False, where=where, problem=str(error))
        return [finding], np.dtype(candidate.dtype)
    allowed = [inputs[1]] if op.function == "mask" else None
    finding = judge.finding(op, [ours], [truth], [peer], allowed=allowed, where=where)
    return [finding], ours.dtype


def _cast(op: Op, truth: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A reference activation in the dtype and with the mask value of the candidate."""
    if op.function == "mask":
        truth = np.where(truth < HIDDEN, MASKED, truth)
    return truth if truth.dtype == np.bool_ else truth.astype(dtype)


def _small_rows(x: np.ndarray) -> np.ndarray:
    powers = np.exp2(-(np.arange(x.shape[1]) % SMALL_ROWS)).astype(np.float32)
    return (x.astype(np.float32) * powers[None, :, None]).astype(x.dtype)


# -- One op ----------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSite(Site):
    """An op that differs on the reference's own inputs."""

    op: Op
    inputs: Sequence[np.ndarray]
    """The reference's activations, in the dtypes in which the candidate holds them."""
    truth: np.ndarray
    """The reference's answer in float64."""
    peer: np.ndarray
    """The reference's answer in the candidate's dtype."""

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`."""
        judge = self.comparison.judge(NAME)
        given = list(self.inputs), self.truth, self.peer
        findings, _ = measure(candidate, self.op, *given, judge=judge, where=self.finding.where)
        return findings[0]

    def residual(self) -> Residual | None:
        """See `Site.residual`."""
        try:
            ours = np.asarray(self.candidate.run_op(self.op, self.inputs))
        except Unrunnable:
            return None
        return residual.describe(self.op.tap, ours, self.truth)

    def replaced(self, function: OpFunction) -> Candidate:
        """The candidate with another function for this one op."""
        return replace(self.candidate, replace={**self.candidate.replace, self.op.tap: function})

    def substitute(self) -> Candidate | None:
        """The candidate with the reference's op, called back from the compiled program."""
        model = self.comparison.reference.peer
        like = np.asarray(self.truth)
        dtype = jnp.bool_ if like.dtype == np.bool_ else None

        def reference_op(config: ModelConfig, p: Leaves, *inputs: Any) -> Any:
            def call(*arrays: Any) -> np.ndarray:
                return model.run_op(self.op, [np.asarray(array) for array in arrays])

            ours = jax.eval_shape(lambda: FUNCTIONS[self.op.function](config, p, *inputs))
            answer = jax.ShapeDtypeStruct(ours.shape, dtype or jnp.float32)
            return jax.pure_callback(call, answer, *inputs).astype(ours.dtype)

        return self.replaced(reference_op)


def site(comparison: Comparison, finding: Finding) -> Site:
    """The op of a finding with the inputs it was measured on."""
    probe, judge = comparison.sequences(), comparison.judge(NAME)
    with closing(comparison.reference.truth.stream(probe)) as items:
        walk, reader = Walk(comparison.candidate, comparison.reference, probe, judge), Reader(items)
        for op in walk.ops:
            if op.tap == finding.tap:
                return _op_site(comparison, finding, op, walk)
            walk.findings(op, reader)
    return Site(comparison, NAME, finding)


def _op_site(comparison: Comparison, finding: Finding, op: Op, walk: Walk) -> Site:
    if any(name not in walk.values for name in op.inputs):
        return Site(comparison, NAME, finding)
    inputs = [walk.values[name] for name in op.inputs]
    inputs = [_small_rows(inputs[0])] if finding.where == SMALL else inputs
    reference = comparison.reference
    truth, peer = reference.truth.run_op(op, inputs), reference.peer.run_op(op, inputs)
    return OpSite(comparison, NAME, finding, op, inputs, truth, peer)
