"""Repairs of an op that is another one inside the cached step: those of single ops, tried on what the step runs.

The op cannot be taken out of the step, but it can be asked: the step is run with other
values in place of the taps that the op reads, and its answer is read off. So it is a
black box like any other, and what undoes its difference from the reference's op, on
what it read in the step, is put around it there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op, Wiring, ops
from oracle.candidate import Candidate, Step, Unrunnable, unrunnable
from oracle.repairs.decode import caches, step_inputs
from oracle.repairs.ops import operators
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import decode
from oracle.rungs.decode_site import Call, DecodeSite
from oracle.rungs.operators import OpSite
from oracle.site import Site

NOT_ASKED = ("embed", "attention_mask", "store")
"""Ops that read model inputs, which no tap can stand for; angles are, because they only multiply."""


class Asked:
    """An op as a step computes it, called through the step."""

    def __init__(self, step: Step, op: Op):
        self.step, self.op = step, op
        self.params: Mapping[str, Any] = {}
        self.call: tuple[Any, ...] = ()
        self.given: dict[str, Any] = {}

    def bind(self, params: Mapping[str, Any], call: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        """The call of the step through which the op is called from now on."""
        self.params, self.call, self.given = params, call, dict(given)

    def __call__(self, config: ModelConfig, p: Leaves, *inputs: Any) -> Any:
        """What the step writes at the op's tap if it reads these."""
        # The tap `mask` has the name of the function that reads it.
        fed = {name: _constant(x) for name, x in zip(self.op.inputs, inputs, strict=True) if name != "mask"}
        params = {**self.params, **{f"{self.op.parameters}.{leaf}": array for leaf, array in p.items()}}
        given = {**self.given, "replace": {**self.given.get("replace", {}), **fed}}
        output, _ = self.step(config, params, *self.call, **given)
        return output.taps[self.op.tap]


def _constant(value: Any) -> OpFunction:
    return lambda *_: value


@dataclass(frozen=True)
class Inside:
    """The op of a site, as the step runs it, beside the reference's."""

    box: OpSite
    asked: Asked | None
    """None for angles, which are known from what they were."""
    wrong: Sequence[Op]
    """All ops of its function that the step computes otherwise than they are alone."""

    def repaired(self, site: DecodeSite, function: OpFunction, only: Callable[[int], bool]) -> Candidate:
        """The candidate with a function in place of those ops in some calls of its step, told by how many ids."""
        inner, asked = site.candidate.step, self.asked

        def step(config: ModelConfig, params: Any, ids: Any, counts: Any, cache: Any, **given: Any) -> Any:
            if not only(ids.shape[1]):
                return inner(config, params, ids, counts, cache, **given)
            if asked is not None:
                asked.bind(params, (ids, counts, cache), given)
            changes = {op.tap: _of(op, asked, function) for op in self.wrong}
            given["replace"] = {**given.get("replace", {}), **changes}
            return inner(config, params, ids, counts, cache, **given)

        return replace(site.candidate, step=step)


def _of(op: Op, asked: Asked | None, function: OpFunction) -> OpFunction:
    def run(config: ModelConfig, p: Leaves, *inputs: Any) -> Any:
        if asked is not None:
            asked.op = op
        return function(config, p, *inputs)

    return run


def inside(site: DecodeSite) -> Inside | None:
    """The op of a site in its step; None if what it read is wrong, or it is the op that was measured alone."""
    history = site.once(caches.observed)
    if not history or site.op.function in NOT_ASKED or site.once(step_inputs.own):
        return None
    if site.once(step_inputs.found) is not None:
        return None
    call, candidate = history[-1], site.candidate
    asked = None if site.op.function == "angles" else Asked(candidate.step, site.op)
    if asked is not None:
        asked.bind(candidate.params, (jnp.asarray(call.ids), jnp.asarray(call.counts), call.before), {})
    function = asked or _multiplied(site, call)
    box = function and _box(site, call, function)
    if box is None:
        return None
    alike = [op for op in ops(candidate.config, Wiring(cached=True)) if op.function == site.op.function]
    return Inside(box, asked, [op for op in alike if not step_inputs.as_alone(candidate, op, call)])


def _multiplied(site: DecodeSite, call: Call) -> OpFunction | None:
    """Angles that are each position times one frequency a pair, as they are of all real tokens."""
    real = np.arange(call.ids.shape[1]) < call.counts[:, None]
    positions = np.asarray(step_inputs.inputs(site.candidate, call)["positions"])[real].astype(np.float64)
    angles = np.asarray(call.taps[site.op.tap])[real].astype(np.float64)
    furthest = int(positions.argmax())
    if len(positions) != len(angles) or not positions[furthest]:
        return None
    turns = angles[furthest] / positions[furthest]
    if not np.allclose(angles, positions[:, None] * turns, rtol=2.0**-21, atol=1e-30):
        return None
    return lambda config, p, given: given[..., None].astype(jnp.float32) * jnp.asarray(turns, jnp.float32)


def _box(site: DecodeSite, call: Call, function: OpFunction) -> OpSite | None:
    op, candidate = site.op, site.candidate
    known = {**step_inputs.inputs(candidate, call), **call.taps}
    inputs = [np.asarray(known[name]) for name in op.inputs]
    reference = site.comparison.reference
    try:
        truth, peer = reference.truth.run_op(op, inputs), reference.peer.run_op(op, inputs)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return None
    alone = replace(candidate, replace={**candidate.replace, op.tap: function})
    made = OpSite(replace(site.comparison, candidate=alone), "operators", site.finding, op, inputs, truth, peer)
    try:
        return replace(made, finding=made.measure(alone))
    except Unrunnable:
        return None


def tried(repair: Repair) -> Callable[[Site], Iterator[Variant]]:
    """What undoes the op's difference on what it read in the step, put around it there."""

    def variants(site: Site) -> Iterator[Variant]:
        found = site.once(inside) if isinstance(site, DecodeSite) else None
        if not isinstance(site, DecodeSite) or found is None or found.box.finding.ok:
            return
        with suppress(Unrunnable), unrunnable("op"):
            for variant in repair.variants(found.box):
                after, before = found.box.measure(variant.candidate), found.box.finding
                if after.ok and (before.problem or after.error <= before.error / 2):
                    when, only = caches.wrong_in(
                        site, lambda call: not step_inputs.as_alone(site.candidate, site.op, call)
                    )
                    candidate = found.repaired(site, variant.candidate.function(site.op), only)
                    yield replace(variant, change=f"{variant.change} {when}".rstrip(), candidate=candidate)

    return variants


REPAIRS: tuple[Repair, ...] = tuple(
    replace(
        repair,
        advice=f"an op is replaced, or its config changed, inside the cached step (jaxgpt/model.py): {repair.advice}",
        rungs=(decode.NAME,),
        variants=tried(repair),
    )
    for repair in operators.REPAIRS
)
"""Those of single ops, in their order."""
