"""A whole forward, cached or not, as a black box whose ops can be listened to and given other inputs.

Every op of the table is put in the way of the pass, under its tap's name, as the same
function with an ear: what it reads and writes is on a tape. A change may then compute
one op from what the table says it reads, instead of from what the pass gives it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, Leaves, OpFunction
from jaxgpt.taps import Op, Wiring, ops
from oracle import model_inputs
from oracle.candidate import Candidate, Unrunnable

Tape = dict[str, Any]
"""Model inputs as they ought to be, parameters under their names, and every tap so far."""
Change = Callable[[OpFunction, Op, Tape, ModelConfig, Leaves, Sequence[Any]], Any]
"""The op's answer, given its function, the tape, and the config, parameters and inputs that the pass gives it."""


def heard(table: Sequence[Op], given: Mapping[str, OpFunction], tape: Tape, changes: Mapping[str, Change]) -> Any:
    """`replace` of a pass: every op by tap, with its answer on the tape and the changes made."""

    def listening(op: Op) -> OpFunction:
        function = given.get(op.tap) or given.get(op.function) or FUNCTIONS[op.function]
        change = changes.get(op.tap) or changes.get(op.function)

        def run(config: ModelConfig, p: Leaves, *inputs: Any) -> Any:
            changed = change(function, op, tape, config, p, inputs) if change else function(config, p, *inputs)
            tape[op.tap] = changed
            return changed

        return run

    return {op.tap: listening(op) for op in table}


def forward(candidate: Candidate, changes: Mapping[str, Change]) -> Candidate:
    """The candidate with changes, by tap or function, in its forward of whole sequences."""
    inner = candidate.forward_pass

    def forward_pass(config: ModelConfig, params: Any, ids: Any, **given: Any) -> Any:
        tape = {**params, **model_inputs.of_sequences(ids, given.get("positions"), given.get("segments"))}
        given["replace"] = heard(ops(config), given.get("replace", {}), tape, changes)
        return inner(config, params, ids, **given)

    return replace(candidate, forward_pass=forward_pass)


def settled(candidate: Candidate, taps: Collection[str], rounds: int) -> Candidate:
    """The candidate with some ops of its forward computed from what the table says they read, whenever that comes.

    A pass that computes it only later is run again, as often as needed, and its ops read
    what the round before gave.
    """
    inner = candidate.forward_pass

    def forward_pass(config: ModelConfig, params: Any, ids: Any, **given: Any) -> Any:
        inputs = model_inputs.of_sequences(ids, given.get("positions"), given.get("segments"))
        changes, tape, output = {}, dict[str, Any](), None
        for _ in range(rounds):
            changes = {tap: _after(tape) for tap in taps}
            tape = {**params, **inputs}
            put = heard(ops(config), given.get("replace", {}), tape, changes)
            output = inner(config, params, ids, **{**given, "replace": put})
        return output

    return replace(candidate, forward_pass=forward_pass)


def _after(before: Tape) -> Change:
    def change(function: OpFunction, op: Op, tape: Tape, config: ModelConfig, p: Leaves, inputs: Sequence[Any]) -> Any:
        known = {**before, **tape}
        ready = all(name in known for name in op.inputs)
        return (as_wired if ready else untouched)(function, op, known, config, p, inputs)

    return change


def cached(candidate: Candidate, changes: Mapping[str, Change]) -> Candidate:
    """The candidate with changes, by tap or function, in its cached step."""
    inner = candidate.step

    def step(config: ModelConfig, params: Any, ids: Any, counts: Any, cache: Any, **given: Any) -> Any:
        tape = {**params, **model_inputs.of_step(config, ids, counts, cache)}
        given["replace"] = heard(ops(config, Wiring(cached=True)), given.get("replace", {}), tape, changes)
        return inner(config, params, ids, counts, cache, **given)

    return replace(candidate, step=step)


def as_wired(function: OpFunction, op: Op, tape: Tape, config: ModelConfig, p: Leaves, inputs: Sequence[Any]) -> Any:
    """From what the table says the op reads.

    Raises:
        Unrunnable: the pass has not computed it yet.
    """
    late = next((name for name in op.inputs if name not in tape), None)
    if late is not None:
        raise Unrunnable(f"{op.tap} is computed before {late}")
    own = model.leaves(tape, op.parameters) if op.parameters else p
    return function(config, own, *(tape[name] for name in op.inputs))


def untouched(function: OpFunction, op: Op, tape: Tape, config: ModelConfig, p: Leaves, inputs: Sequence[Any]) -> Any:
    """The function that was measured alone, on what the pass gives it."""
    return function(config, p, *inputs)
