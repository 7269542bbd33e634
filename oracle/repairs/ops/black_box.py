"""A candidate's op as a black box: repairs change what goes in and what comes out, never the op.

The forms of a change are: another config, other parameters, other inputs, a fixed
transformation of the output, and `f(x) + right(x) - wrong(x)`, which brings the error
to the noise only if f computes exactly what the hypothesis `wrong` says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from oracle.candidate import Unrunnable
from oracle.repairs import facts
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import operators
from oracle.rungs.operators import OpSite
from oracle.site import Site

Change = tuple[str, OpFunction]
"""In words, and the op with the change around it."""
NICE = 3
"""Digits of a number that somebody may have typed."""


@dataclass(frozen=True)
class BlackBox:
    """The op of a site: it can be called, but not looked into."""

    site: OpSite
    function: OpFunction

    @cached_property
    def facts(self) -> facts.Facts:
        """Of the reference's model."""
        return facts.of(self.site.comparison.reference)

    @cached_property
    def answer(self) -> np.ndarray:
        """What it gives on the reference's inputs.

        Raises:
            Unrunnable: it cannot take them.
        """
        return self.given(self.site.inputs)

    def given(self, inputs: Sequence[Any]) -> np.ndarray:
        """What it gives on other inputs, float32 where it is a narrow float.

        Raises:
            Unrunnable: it cannot take them.
        """
        return _plain(self.site.candidate.run_op(self.site.op, inputs))

    def without_bias(self, inputs: Sequence[Any]) -> np.ndarray:
        """What it gives with a bias of zero."""
        p = {name: jnp.asarray(array, self.site.candidate.dtype) for name, array in self.parameters.items()}
        zero = {name: jnp.zeros_like(array) for name, array in p.items() if name == "bias"}
        return _plain(self.function(self.site.candidate.config, {**p, **zero}, *map(jnp.asarray, inputs)))

    @cached_property
    def parameters(self) -> dict[str, np.ndarray]:
        """The op's parameters in the compute dtype, as float32."""
        module = self.site.op.parameters
        leaves = model.leaves(self.site.candidate.params, module) if module else {}
        return {name: np.asarray(array).astype(np.float32) for name, array in leaves.items()}

    @property
    def epsilon(self) -> float:
        """How far its output may be off relatively, were it right: one unit in the last place."""
        return 2.0**-7 if self.site.candidate.dtype == "bfloat16" else 2.0**-23

    # -- Changes -----------------------------------------------------------------------

    def configured(self, change: str, **fields: Any) -> Iterator[Change]:
        """With other config fields, if the config has not those already."""
        config = self.site.candidate.config
        if any(getattr(config, name) != value for name, value in fields.items()):
            yield change, lambda config, p, *x: self.function(replace(config, **fields), p, *x)

    def fed(self, change: str, inputs: Callable[..., Sequence[Any]]) -> Change:
        """With other inputs, made from those it is given."""
        return change, lambda config, p, *x: self.function(config, p, *inputs(*x))

    def turned(self, change: str, output: Callable[..., Any]) -> Change:
        """With its output transformed: `output(y, *inputs)`; the dtype stays."""

        def repaired(config: ModelConfig, p: Leaves, *x: Any) -> Any:
            y = self.function(config, p, *x)
            return output(y, *x).astype(y.dtype)

        return change, repaired

    def scaled(self, change: str, factor: float) -> Change:
        """With its output multiplied."""
        return self.turned(change, lambda y, *_: wide(y) * np.float32(factor))

    def less(self, wrong: Callable[..., Any], right: Callable[..., Any], named: str, proper: str) -> Change:
        """`f(x) + right(x) - wrong(x)`; both are `function(parameters, *inputs)` in float32."""

        def repaired(config: ModelConfig, p: Leaves, *x: Any) -> Any:
            y = self.function(config, p, *x)
            given = {name: wide(array) for name, array in p.items()}, *map(wide, x)
            return (wide(y) + (right(*given) - wrong(*given))).astype(y.dtype)

        return f"less the difference between {named} and {proper}", repaired

    def answering(self, change: str, wrong: Callable[..., Any], right: Callable[..., Any]) -> Iterator[Change]:
        """With `right` in place of each number that is `wrong`; nothing unless all of them are.

        For ops that only move numbers, in which the rounding of `less` would show. Both
        are functions of the inputs in float32.
        """

        def is_wrong(y: Any, *x: Any) -> Any:
            w = wrong(*map(wide, x))
            return jnp.abs(wide(y) - w) <= 4 * self.epsilon * jnp.abs(w).max(-1, keepdims=True)

        given = [jnp.asarray(x) for x in self.site.inputs]
        if self.answer.shape == self.site.truth.shape and bool(is_wrong(self.answer, *given).all()):
            yield self.turned(change, lambda y, *x: jnp.where(is_wrong(y, *x), right(*map(wide, x)), wide(y)))


def _plain(answer: Any) -> np.ndarray:
    array = np.asarray(answer)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array


def wide(x: Any) -> Any:
    """Floats as float32; the rest as it is."""
    return jnp.asarray(x, jnp.float32) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x


def nice(value: float, tolerance: float, known: Sequence[float] = ()) -> float:
    """The number somebody may have meant, where it is within the (relative) tolerance."""
    for number in (*known, float(f"{value:.{NICE}g}")):
        if abs(number - value) <= tolerance * abs(value):
            return number
    return value


Maker = Callable[[BlackBox], Iterator[Change]]


def op_repair(cause: str, advice: str, functions: Sequence[str], maker: Maker, *, last_resort: bool = False) -> Repair:
    """A repair of the ops of some functions (of every op, if none is named)."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, OpSite) or (functions and site.op.function not in functions):
            return
        # An op that does not run on its inputs is not examined further.
        with suppress(Unrunnable):
            for change, function in maker(BlackBox(site, site.candidate.function(site.op))):
                yield Variant(change, site.replaced(function))

    return Repair(cause, advice, (operators.NAME,), variants, last_resort)


def shape_of(function: OpFunction, config: ModelConfig, p: Leaves, *x: Any) -> jax.ShapeDtypeStruct:
    """What the op would give, without running it."""
    return jax.eval_shape(lambda: function(config, p, *x))
