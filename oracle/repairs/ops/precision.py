"""Repair of ops computed too narrowly: their program, step by step, without the narrow numbers."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.compare import WIDE
from oracle.repairs.ops.black_box import BlackBox, Change, Maker, op_repair
from oracle.repairs.repair import Repair

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Steps that only stand for other steps, and where they have them."""
DTYPES = ("new_dtype", "preferred_element_type", "dtype")
"""Parameters that say in which dtype a step answers."""
_PRINTED = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "f8_e4m3fn", "float8_e5m2": "f8_e5m2"}
NARROW = tuple(_PRINTED)
CONSTANTS = (
    0.5**0.5, 2**0.5, (2 / math.pi) ** 0.5, (8 / math.pi) ** 0.5, 0.044715, 1.702, 1e-5, 1e-6, 1e-8, 1e-12,
)  # fmt: skip
"""Numbers of the ops; one that was rounded is taken for the one it came from."""


def without(name: str) -> Maker:
    """Every value that is of one narrow dtype, in float32."""
    narrow = jnp.dtype(name)

    def maker(box: BlackBox) -> Iterator[Change]:
        known = [*CONSTANTS, *box.facts.constants]
        full = box.site.candidate.dtype == "float32"

        def repaired(config: ModelConfig, p: Leaves, *x: Any) -> Any:
            program, answer = jax.make_jaxpr(partial(box.function, config), return_shape=True)(p, *x)
            (y,) = Widened(narrow, known).run(program, jax.tree.leaves((p, *x)))
            return y if box.site.op.function in WIDE or full else y.astype(answer.dtype)

        if _holds(box, narrow):
            yield f"with float32 in place of {name}", repaired

    return maker


def _holds(box: BlackBox, narrow: np.dtype) -> bool:
    """Some step of its program has a value of that dtype."""
    p = {name: jnp.asarray(array, box.site.candidate.dtype) for name, array in box.parameters.items()}
    given = map(jnp.asarray, box.site.inputs)
    try:
        program = jax.make_jaxpr(partial(box.function, box.site.candidate.config))(p, *given)
    except (TypeError, ValueError, IndexError):
        return False
    return re.search(rf"\b{_PRINTED[narrow.name]}\[", str(program)) is not None


class Widened:
    """Evaluates a program with one dtype replaced by float32."""

    def __init__(self, narrow: np.dtype, known: Sequence[float]):
        self.narrow, self.known = narrow, known

    def run(self, program: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
        """The program's outputs."""
        return self._run(program.jaxpr, program.consts, inputs)

    def _run(self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return self._literal(atom) if isinstance(atom, Literal) else values[atom]

        values.update(zip(jaxpr.constvars, map(self._constant, constants), strict=True))
        values.update(zip(jaxpr.invars, map(self._wide, inputs), strict=True))
        for step in jaxpr.eqns:
            outputs = self._step(step, [read(atom) for atom in step.invars])
            values.update(zip(step.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, step: Any, given: list[Any]) -> list[Any]:
        name, params = step.primitive.name, step.params
        if name in CALLS:
            return self.run(params[CALLS[name]], given)
        if name == "reduce_precision" and self._rounds(params):
            return given
        if any(isinstance(value, ClosedJaxpr | Jaxpr) for value in jax.tree.leaves(params)):
            # A loop keeps the dtypes it was written for.
            given = [value.astype(atom.aval.dtype) for value, atom in zip(given, step.invars, strict=True)]
        else:
            params = {key: self._dtype(value) if key in DTYPES else value for key, value in params.items()}
        answer = step.primitive.bind(*given, **params)
        answers = answer if step.primitive.multiple_results else [answer]
        return [self._wide(value) for value in answers]

    def _dtype(self, dtype: Any) -> Any:
        return jnp.dtype("float32") if dtype is not None and jnp.dtype(dtype) == self.narrow else dtype

    def _rounds(self, params: Any) -> bool:
        digits = jnp.finfo(self.narrow)
        return (params["exponent_bits"], params["mantissa_bits"]) == (digits.nexp, digits.nmant)

    def _wide(self, value: Any) -> Any:
        return value.astype(jnp.float32) if getattr(value, "dtype", None) == self.narrow else value

    def _literal(self, literal: Literal) -> Any:
        narrow = getattr(literal.aval, "dtype", None) == self.narrow
        return self._constant(np.asarray(literal.val, self.narrow)) if narrow else literal.val

    def _constant(self, value: Any) -> Any:
        if getattr(value, "dtype", None) != self.narrow or not isinstance(value, np.ndarray | jax.Array):
            return value
        # Constants are few numbers; each may be one of the op's that was rounded.
        rounded = np.asarray(value)
        wide = rounded.astype(np.float32)
        for number in self.known:
            for signed in (number, -number):
                wide = np.where(rounded == np.asarray(signed).astype(self.narrow), np.float32(signed), wide)
        return jnp.asarray(wide)


_ADVICE = "leave the narrow dtype out of the op: norms, rotation, softmax, scores and activations are float32 inside"
REPAIRS: tuple[Repair, ...] = tuple(op_repair(f"computed in {name}", _ADVICE, (), without(name)) for name in NARROW)
"""Repairs of ops computed too narrowly."""
