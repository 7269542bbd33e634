"""What an op of a pass was computed from: searched until computing it again gives what the pass gave."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import jax.numpy as jnp

from jaxgpt import model
from jaxgpt.taps import INPUTS, Op
from oracle.candidate import Candidate, Unrunnable, unrunnable

NEAR = 16
"""Earlier taps of a fitting shape that are tried for both inputs of a sum."""


@dataclass(frozen=True)
class Reading:
    """What an op was computed from."""

    op: Op
    """As it should be."""
    inputs: tuple[str, ...]
    """Taps, model inputs, or descriptions of changed model inputs."""
    parameters: str

    def __str__(self) -> str:
        changed = [
            f"{wanted} instead of {read}"
            for wanted, read in zip(self.op.inputs, self.inputs, strict=True)
            if wanted != read
        ]
        if self.parameters != self.op.parameters:
            changed.append(f"the parameters of {self.op.parameters} instead of {self.parameters}")
        return f"with {self.op.tap} computed from {' and '.join(changed)}"


@dataclass(frozen=True)
class Pass:
    """A forward that was made, and a way to compute its ops again."""

    table: Sequence[Op]
    values: Mapping[str, Any]
    """Taps and model inputs; some of those, under a name with a space, as somebody may have got them wrong."""
    compute: Callable[[Op, str, Sequence[Any]], Any]
    """An op with the parameters of a module on some inputs."""
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """Of the parameters of every module; none where it is no question whose an op uses."""

    def reading(self, op: Op) -> Reading | None:
        """The only thing that gives what the pass gave; None if nothing does, or what the table says."""
        if self.is_as_wired(op):
            return None
        return next((attempt for attempt in self._attempts(op) if self._gives(attempt)), None)

    def is_as_wired(self, op: Op) -> bool:
        """The pass gave what comes of what the table says."""
        return self._gives(Reading(op, op.inputs, op.parameters))

    def _gives(self, attempt: Reading) -> bool:
        op = attempt.op
        try:
            with unrunnable("op"):
                again = self.compute(op, attempt.parameters, [self.values[name] for name in attempt.inputs])
                return _same(again, self.values[op.tap])
        except Unrunnable:
            return False

    def _attempts(self, op: Op) -> Iterator[Reading]:
        for kind in dict.fromkeys(key.partition(" ")[2] for key in self.values if " " in key):
            names = [f"{name} {kind}" if f"{name} {kind}" in self.values else name for name in op.inputs]
            yield Reading(op, tuple(names), op.parameters)
        choices = [self._like(name, op) for name in op.inputs]
        for slot, names in enumerate(choices):
            for name in names:
                yield Reading(op, (*op.inputs[:slot], name, *op.inputs[slot + 1 :]), op.parameters)
        for module in self._modules(op.parameters):
            yield Reading(op, op.inputs, module)
        if len(op.inputs) == 2:
            for pair in product(*(names[:NEAR] for names in choices)):
                yield Reading(op, pair, op.parameters)

    def _like(self, name: str, op: Op) -> list[str]:
        """Taps that could have been given in place of one: earlier ones, the latest first, then later streams."""
        if name in INPUTS or name.startswith("cache."):
            return []
        here = self.table.index(op)
        before = [other.tap for other in reversed(self.table[:here]) if other.tap != name]
        after = [other.tap for other in self.table[here + 1 :] if other.function == "add"]
        taps = [tap for tap in (*before, *after) if tap in self.values]
        shape, dtype = self.values[name].shape, self.values[name].dtype
        return [tap for tap in taps if (self.values[tap].shape, self.values[tap].dtype) == (shape, dtype)]

    def _modules(self, own: str) -> list[str]:
        wanted = self.shapes.get(own)
        return [module for module, shapes in self.shapes.items() if wanted and module != own and shapes == wanted]


def of_candidate(candidate: Candidate, table: Sequence[Op], values: Mapping[str, Any]) -> Pass:
    """A pass of the model under test."""

    def compute(op: Op, parameters: str, inputs: Sequence[Any]) -> Any:
        p = model.leaves(candidate.params, parameters) if parameters else {}
        return candidate.function(op)(candidate.config, p, *inputs)

    modules = dict.fromkeys(name.rpartition(".")[0] for name in candidate.params)
    leaves = {module: model.leaves(candidate.params, module) for module in modules}
    shapes = {module: {name: array.shape for name, array in own.items()} for module, own in leaves.items()}
    return Pass(table, values, compute, shapes)


def _same(given: Any, made: Any) -> bool:
    if given.shape != made.shape or given.dtype != made.dtype:
        return False
    if not jnp.issubdtype(made.dtype, jnp.floating):
        return bool((given == made).all())
    a, b = given.astype(jnp.float32), made.astype(jnp.float32)
    size = float(jnp.linalg.norm(b.ravel()))
    # The pass may round otherwise than the op alone: it is compiled as a whole.
    return float(jnp.linalg.norm((a - b).ravel())) <= 8 * float(jnp.finfo(made.dtype).eps) * size
