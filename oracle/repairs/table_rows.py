"""A wrong row in the product's table of ops: the reference tells what an op reads.

The oracle walks the same table, so an op that it names the wrong inputs for is fed with
those, alone and in the pass, and agrees with itself. The reference has no table: which of
its taps it computes an op from is searched as `oracle.repairs.readings` does elsewhere.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op, Wiring, layer_input, ops
from oracle import model_inputs
from oracle.candidate import Candidate, Unrunnable
from oracle.reference import Model, to_numpy
from oracle.repairs import interception
from oracle.repairs.readings import Pass, Reading
from oracle.results import layer_of
from oracle.rungs.forward import ForwardSite


def wrong_row(site: ForwardSite) -> Reading | None:
    """What the table says the site's op reads, of the op as the reference computes it; None if the row is right."""
    op, truth = site.op, site.comparison.reference.truth
    values = _values(site, truth)
    if any(name not in values for name in op.inputs):
        return None
    read = Pass(ops(site.candidate.config), values, partial(_computed, truth)).reading(op)
    return read and Reading(replace(op, inputs=read.inputs), op.inputs, op.parameters)


def _values(site: ForwardSite, truth: Model) -> dict[str, Any]:
    """The reference's taps up to the site's, in float32, and the model inputs."""
    probe = site.forwards.probe
    given = model_inputs.of_sequences(*map(jnp.asarray, (probe.ids, probe.positions, probe.segments)))
    values: dict[str, Any] = {name: np.asarray(value) for name, value in given.items()}
    with closing(truth.stream(probe)) as items:
        for tap, tensor in items:
            values[tap] = _narrow(to_numpy(tensor))
            if tap == site.op.tap:
                break
    return values


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _computed(truth: Model, op: Op, _: str, inputs: Sequence[Any]) -> np.ndarray:
    try:
        return _narrow(truth.run_op(op, inputs))
    except RuntimeError as error:
        raise Unrunnable(str(error)) from error


def advice(row: Reading) -> str:
    """Which row to change."""
    rest = " (the repair corrects it in every layer)" if layer_of(row.op.tap) is not None else ""
    return f"the row of {row.op.tap} in jaxgpt/taps.py must name {', '.join(row.op.inputs)} as what it reads{rest}"


# -- The candidate with the row corrected ----------------------------------------------


def corrected(site: ForwardSite, row: Reading) -> Candidate:
    """With every layer's op of this row reading what the reference reads, cached or not."""
    return corrected_step(interception.forward(site.candidate, _changes(row, site.candidate.config, Wiring())), row)


def corrected_step(candidate: Candidate, row: Reading) -> Candidate:
    """The same of cached steps alone."""
    return interception.cached(candidate, _changes(row, candidate.config, Wiring(cached=True)))


def _changes(row: Reading, config: ModelConfig, wiring: Wiring) -> dict[str, interception.Change]:
    changes: dict[str, interception.Change] = {}
    pairs = list(enumerate(zip(row.op.inputs, row.inputs, strict=True)))
    for op in ops(config, wiring):
        seen = partial(_moved, config=config, here=layer_of(row.op.tap), there=layer_of(op.tap))
        if op.tap == seen(row.op.tap):
            wrong = {n: seen(right) for n, (right, read) in pairs if right != read and op.inputs[n] == seen(read)}
            changes[op.tap] = _reading(wrong)
    return changes


def _moved(tap: str, config: ModelConfig, here: int | None, there: int | None) -> str:
    """The same tap as seen from another layer."""
    if here is not None and there is not None and tap == layer_input(config, here, Wiring()):
        return layer_input(config, there, Wiring())
    prefix = f"layers.{here}."
    return f"layers.{there}.{tap.removeprefix(prefix)}" if tap.startswith(prefix) else tap


def _reading(slots: Mapping[int, str]) -> interception.Change:
    """Some inputs from the tape."""

    def change(function: OpFunction, op: Op, tape: Any, config: ModelConfig, p: Leaves, inputs: Sequence[Any]) -> Any:
        late = next((name for name in slots.values() if name not in tape), None)
        if late is not None:
            raise Unrunnable(f"{op.tap} is computed before {late}")
        return function(config, p, *(tape[slots[slot]] if slot in slots else x for slot, x in enumerate(inputs)))

    return change
