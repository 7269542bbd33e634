"""Rung operators: each op of each layer on the reference's own inputs.

The inputs of an op are the reference's activations, cast to the dtype in which the
candidate holds them; truth is the reference's op in float64 on exactly those cast
values, with the same cast parameters. So a difference is the op's own, whatever
came before it. The cache's store, which has no activations to be fed, gets random ones.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, MASKED, Leaves, OpFunction
from jaxgpt.taps import INPUTS, Op, Wiring, ops
from oracle import echo, model_inputs, noise, residual
from oracle.candidate import CalledBack, Candidate, Unrunnable
from oracle.compare import HIDDEN, WIDE, Judge
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.probe import Probe
from oracle.reference import Reference
from oracle.results import Finding, Residual, RungResult
from oracle.site import Site
from oracle.streaming import Reader
from torchref.config import LlamaConfig

NAME = "operators"

SMALL = "small rows"
SMALL_ROWS = 16
"""Norms also see their rows scaled by 1, 1/2, … 2^−15: there the epsilon decides."""
EDGE = "window edge"
"""A mask with a window is also asked for tokens at its end, which the probe may not reach."""

Answer = tuple[list[Finding], np.dtype]
"""Findings of one op, and the dtype in which the candidate answers."""
Measured = dict[tuple[Hashable, ...], tuple[Answer, Mapping[str, Any]]]
"""Answers with the parameters they were given: a repair changes one op, and the others need not run again."""


def run(
    candidate: Candidate, reference: Reference, probe: Probe, judge: Judge, measured: Measured | None = None
) -> RungResult:
    """One finding per op in execution order (norms, stores and windows: two), then one per tap the candidate lacks."""
    findings: list[Finding] = []
    with closing(reference.truth.stream(probe)) as items:
        reader = Reader(items)
        local = Walk(candidate, reference, probe, judge, measured)
        for op in local.ops:
            findings += local.findings(op, reader)
        findings += [judge.missing(Op(tap, "", ()), "candidate") for tap in reader.rest()]
    broken = sum(not finding.ok for finding in findings)
    worst = max((finding.noise for finding in findings if finding.ok), default=0.0)
    summary = f"{len(findings)} ops on the reference's inputs, {broken} broken; the others within {worst:.2g}x noise"
    return RungResult(NAME, findings, summary)


class Walk:
    """The walk over the ops: holds the reference's activations for as long as an op needs them."""

    def __init__(
        self,
        candidate: Candidate,
        reference: Reference,
        probe: Probe,
        judge: Judge,
        measured: Measured | None = None,
    ):
        self.candidate, self.reference, self.judge = candidate, reference, judge
        self.measured = {} if measured is None else measured
        # A repair of the vocabulary's size asks about other ids.
        self.asked = probe.ids.tobytes()
        uncached = {op.tap: op for op in ops(candidate.config)}
        self.ops = tuple(uncached.get(op.tap, op) for op in ops(candidate.config, Wiring(cached=True)))
        given = model_inputs.of_sequences(*map(jnp.asarray, (probe.ids, probe.positions, probe.segments)))
        self.values = {name: np.asarray(value) for name, value in given.items()}
        self.last_use = {name: op.tap for op in uncached.values() for name in op.inputs}

    def findings(self, op: Op, reader: Reader) -> list[Finding]:
        """Compare one op, then hold the reference's output for the ops after it."""
        if op.function == "store":
            return [finding for where in STORES for finding in self._stored(op, where)]
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
        if op.function == "attention_mask" and (window := _window(self.reference)) is not None:
            findings += self.compare(op, _edge(window), where=EDGE)[0]
        self._hold(op, truth.numpy(), dtype)
        return findings

    def skip(self, op: Op, reader: Reader) -> None:
        """Hold the reference's output without comparing."""
        truth = reader.take(op.tap) if op.function != "store" else None
        if truth is not None and all(name in self.values for name in op.inputs):
            self._hold(op, truth.numpy(), self._answer_dtype(op))

    def inputs(self, op: Op, where: str) -> list[np.ndarray] | None:
        """What an op is compared on; nothing if the reference lacks some of it."""
        if op.function == "store":
            return _stored_inputs(self.candidate, where)
        if any(name not in self.values for name in op.inputs):
            return None
        window = _window(self.reference)
        if where == EDGE and window is not None:
            return _edge(window)
        inputs = [self.values[name] for name in op.inputs]
        return [_small_rows(inputs[0])] if where == SMALL else inputs

    def _hold(self, op: Op, truth: np.ndarray, dtype: np.dtype) -> None:
        if op.function == "scores":
            # The mask's value does not exist in a narrower dtype, in which some candidate may answer.
            dtype = np.dtype(np.float32)
        self.values[op.tap] = _cast(op, truth, dtype)
        for name in op.inputs:
            if self.last_use[name] == op.tap and name not in INPUTS:
                self.values.pop(name, None)

    def _answer_dtype(self, op: Op) -> np.dtype:
        inputs = [self.values[name] for name in op.inputs]
        if (known := self._known(op, inputs, "")) is not None:
            return known[1]
        function = partial(self.candidate.function(op), self.candidate.config)
        parameters = model.leaves(self.candidate.params, op.parameters) if op.parameters else {}
        try:
            return jax.eval_shape(function, parameters, *inputs).dtype
        except (TypeError, ValueError, IndexError):
            return np.dtype(self.candidate.dtype)

    def _stored(self, op: Op, where: str) -> list[Finding]:
        try:
            return self.compare(op, _stored_inputs(self.candidate, where), where)[0]
        except IndexError:
            return [self.judge.missing(op, "reference", where)]

    def compare(self, op: Op, inputs: list[np.ndarray], where: str = "") -> tuple[list[Finding], np.dtype]:
        """Candidate, truth and peer on the same inputs; the dtype in which the candidate answers."""
        if (known := self._known(op, inputs, where)) is not None:
            return list(known[0]), known[1]
        truth = self.reference.truth.run_op(op, inputs)
        peer = self.reference.peer.run_op(op, inputs)
        answer = measure(self.candidate, self.reference, op, inputs, truth, peer, self.judge, where)
        self.measured[self._question(op, inputs, where)] = answer, self._leaves(op)
        return answer

    def _known(self, op: Op, inputs: list[np.ndarray], where: str) -> Answer | None:
        """What was measured before, if the op and its parameters are the same now."""
        answer, before = self.measured.get(self._question(op, inputs, where), (None, {}))
        now = self._leaves(op)
        same = before.keys() == now.keys() and all(before[name] is leaf for name, leaf in now.items())
        return answer if same else None

    def _question(self, op: Op, inputs: list[np.ndarray], where: str) -> tuple[Hashable, ...]:
        """What a finding depends on beside the parameters; the inputs follow from the ids, but for their dtypes."""
        chosen = self.candidate
        dtypes = (str(array.dtype) for array in inputs)
        return op, where, chosen.function(op), chosen.config, chosen.dtype, self.asked, *dtypes

    def _leaves(self, op: Op) -> Mapping[str, Any]:
        """As the checkpoint stores them: the same objects in every changed candidate."""
        return {name: leaf for name, leaf in self.candidate.stored.items() if name.startswith(f"{op.parameters}.")}


def measure(
    candidate: Candidate,
    reference: Reference,
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
    if op.function == "store":
        judge = replace(judge, calibration=_EXACT)
    finding = judge.finding(op, [ours], [truth], [peer], allowed=allowed, where=where)
    if op.function in SUMS and echo.leave_a_doubt([finding]):
        dtype = jnp.dtype("float32" if op.function in WIDE else judge.dtype)
        orders = _orders(reference, op, inputs, dtype)
        finding = judge.finding(op, [ours], [truth], [peer], where=where, echoes=orders)
    return [finding], ours.dtype


SUMS = ("projection", "head")
"""Sums of many products, of which a few may cancel each other: then the order of the sum decides the error."""

LANES = 4
"""Of the narrowest vector unit in use, 128 bits wide."""


def _orders(reference: Reference, op: Op, inputs: list[np.ndarray], dtype: np.dtype) -> list[list[np.ndarray]]:
    """What the op may answer with its sum in other orders, and rounded before its bias is added.

    A sum of n products, one after the other, is with high probability the exact sum of products
    that are moved by about √n roundings (Higham & Mary 2019, theorem 3.1). Sums are in float32,
    and as many at a time as a vector unit has lanes.
    """
    answers: list[list[np.ndarray]] = []
    rng, (x, *others) = np.random.default_rng(0), inputs
    reach = noise.EPSILON["float32"] / 2 * max(1.0, x.shape[-1] / LANES) ** 0.5
    bias = reference.truth.run_op(op, [np.zeros_like(x), *others])
    for _ in echo.FURTHER:
        moved = x.astype(np.float32) * (1 + reach * rng.uniform(-1, 1, x.shape)).astype(np.float32)
        sums = reference.truth.run_op(op, [moved, *others]) - bias
        answers.append([(sums.astype(dtype).astype(np.float64) + bias).astype(dtype)])
    return answers


def _cast(op: Op, truth: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A reference activation in the dtype and with the mask value of the candidate."""
    if op.function == "mask":
        truth = np.where(truth < HIDDEN, MASKED, truth)
    return truth if truth.dtype == np.bool_ else truth.astype(dtype)


def _small_rows(x: np.ndarray) -> np.ndarray:
    powers = np.exp2(-(np.arange(x.shape[-2]) % SMALL_ROWS)).astype(np.float32)
    return (x.astype(np.float32) * powers[:, None]).astype(x.dtype)


def _window(reference: Reference) -> int | None:
    config = reference.truth.decoder.config
    return config.sliding_window if isinstance(config, LlamaConfig) else None


def _edge(window: int) -> list[np.ndarray]:
    """Slots, key slots and documents: the tokens around the first that does not see the beginning."""
    slots, keys = np.arange(max(0, window - 2), window + 2, dtype=np.int32), np.arange(window + 2, dtype=np.int32)
    return [slots[None], keys, np.ones_like(slots)[None], np.ones_like(keys)[None]]


# -- The cache's store -----------------------------------------------------------------

STORES = {
    "prefill": ((0, 1, 2, 3, 4), (3, 4, 5, 8, 8), (7, 8, 8, 8, 8)),
    "step": ((5,), (0,), (8,)),
}
"""Slots of each row's new tokens in a buffer of 8: ragged rows, and what is outside must be dropped."""
SLOTS = 8


def _stored_inputs(candidate: Candidate, where: str) -> list[np.ndarray]:
    """New keys (or values), a buffer that is full of other numbers, and slots."""
    slots = np.array(STORES[where], np.int32)
    rng, config = np.random.default_rng(slots.size), candidate.config

    def numbers(length: int) -> np.ndarray:
        drawn = rng.standard_normal((len(slots), config.num_key_value_heads, length, config.head_dim))
        return drawn.astype(jnp.dtype(candidate.dtype))

    return [numbers(slots.shape[1]), numbers(SLOTS), slots]


class _Exact(Calibration):
    def threshold(self, rung: str, dtype: str, op: str) -> tuple[float, float]:
        """Copying rounds nothing."""
        return 0.0, 0.0


_EXACT = _Exact(1.0, {}, {})


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
        given = self.op, list(self.inputs), self.truth, self.peer
        findings, _ = measure(candidate, self.comparison.reference, *given, judge=judge, where=self.finding.where)
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
        # The tap `mask` has the name of another op's function.
        key = self.op.function if self.op.tap in FUNCTIONS else self.op.tap
        return replace(self.candidate, replace={**self.candidate.replace, key: function})

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

        return self.replaced(CalledBack(reference_op))


@dataclass(frozen=True)
class StoreSite(OpSite):
    """A store, which must be right for a prefill and for a step alike."""

    others: Sequence[OpSite]
    """The same op where it stores other tokens."""

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`."""
        findings = [super().measure(candidate), *(other.measure(candidate) for other in self.others)]
        return next((finding for finding in findings if not finding.ok), findings[0])


def site(comparison: Comparison, finding: Finding) -> Site:
    """The op of a finding with the inputs it was measured on."""
    return next(sites(comparison, [finding]), Site(comparison, NAME, finding))


def sites(comparison: Comparison, findings: Sequence[Finding]) -> Iterator[Site]:
    """The ops of some findings, in execution order, in one forward of the reference."""
    wanted: dict[str, list[Finding]] = {}
    for finding in findings:
        wanted.setdefault(finding.tap, []).append(finding)
    probe, judge = comparison.sequences(), comparison.judge(NAME)
    with closing(comparison.reference.truth.stream(probe)) as items:
        walk = Walk(comparison.candidate, comparison.reference, probe, judge, comparison.measured)
        reader = Reader(items)
        for op in walk.ops:
            for finding in wanted.pop(op.tap, []):
                yield _op_site(comparison, finding, op, walk)
            if not wanted:
                return
            walk.skip(op, reader)


def _op_site(comparison: Comparison, finding: Finding, op: Op, walk: Walk) -> Site:
    site = _plain_site(comparison, finding, op, walk)
    if op.function != "store" or not isinstance(site, OpSite):
        return site
    elsewhere = [replace(finding, where=where) for where in STORES if where != finding.where]
    others = [_plain_site(comparison, other, op, walk) for other in elsewhere]
    return StoreSite(**vars(site), others=[other for other in others if isinstance(other, OpSite)])


def _plain_site(comparison: Comparison, finding: Finding, op: Op, walk: Walk) -> Site:
    inputs, reference = walk.inputs(op, finding.where), comparison.reference
    if inputs is None:
        return Site(comparison, NAME, finding)
    try:
        truth, peer = reference.truth.run_op(op, inputs), reference.peer.run_op(op, inputs)
    except (KeyError, IndexError):
        return Site(comparison, NAME, finding)
    return OpSite(comparison, NAME, finding, op, inputs, truth, peer)
