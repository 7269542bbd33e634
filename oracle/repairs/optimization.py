"""Repairs of the training step: changes of its settings, of the state that goes in, of the parameters that come out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import lesson
from oracle.candidate import Candidate
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import optimizer
from oracle.site import Site
from oracle.training import Step
from oracle.training_probe import SETTINGS
from oracle.training_site import TrainingSite, trained

RUNGS = (optimizer.NAME,)
Params = dict[str, Any]


class Call(NamedTuple):
    """What a training step is given."""

    config: Any
    settings: TrainSettings
    dtype: str
    state: TrainState
    batches: Any


Around = Callable[[Step, Call], tuple[TrainState, StepReport]]


def _around(change: str, repaired: Around) -> Callable[[Site], Iterator[Variant]]:
    """A repair that calls the candidate's step in another way."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, TrainingSite):
            step = site.candidate.training.step
            yield Variant(change, trained(site.candidate, step=lambda *given: repaired(step, Call(*given))))

    return variants


def _moved(state: TrainState, by: Params) -> TrainState:
    """The state with some parameters moved."""
    return state._replace(params=state.params | {name: state.params[name] + move for name, move in by.items()})


def _of(call: Call, *, matrices: bool) -> Params:
    """Copies of the matrices, or of norms and biases: the step uses up its state."""
    return {name: jnp.array(array) for name, array in call.state.params.items() if (array.ndim > 1) == matrices}


# -- Weight decay ----------------------------------------------------------------------


def _undecayed(step: Step, call: Call) -> tuple[TrainState, StepReport]:
    """Norms and biases get back what decoupled decay took from them."""
    before = _of(call, matrices=False)
    state, report = step(*call)
    share = report.learning_rate * call.settings.weight_decay
    return _moved(state, {name: share * array for name, array in before.items()}), report


def _decayed(step: Step, call: Call) -> tuple[TrainState, StepReport]:
    """Matrices lose what decoupled decay takes."""
    before = _of(call, matrices=True)
    state, report = step(*call)
    share = report.learning_rate * call.settings.weight_decay
    return _moved(state, {name: -share * array for name, array in before.items()}), report


def _decoupled(step: Step, call: Call) -> tuple[TrainState, StepReport]:
    """The step without decay, then decoupled decay."""
    before = _of(call, matrices=True)
    state, report = step(*call._replace(settings=replace(call.settings, weight_decay=0.0)))
    share = report.learning_rate * call.settings.weight_decay
    return _moved(state, {name: -share * array for name, array in before.items()}), report


def _coupled(site: Site) -> Iterator[Variant]:
    """Only where the step's decay is neither decoupled nor missing: else another repair tells it better."""
    if isinstance(site, TrainingSite) and _decay_is_in_the_gradient(site):
        yield from _around("with weight_decay 0 and decay applied after the step", _decoupled)(site)


def _decay_is_in_the_gradient(site: TrainingSite) -> bool:
    """What decay does to a matrix in the first step is neither nothing nor a multiple of the matrix."""
    settings = site.candidate.training.settings
    without = trained(site.candidate, settings=replace(settings, weight_decay=0.0))
    asked = lesson.part(site.comparison)
    name = next(name for name, array in asked.master.items() if array.ndim > 1)
    (decayed,), (plain,) = (_first_step(site, candidate) for candidate in (site.candidate, without))
    effect = (decayed[name] - plain[name]).ravel().astype(np.float64)
    matrix = np.asarray(asked.master[name], np.float64).ravel()
    share = float(effect @ matrix) / float(matrix @ matrix)
    return bool(np.linalg.norm(effect - share * matrix) > 0.1 * np.linalg.norm(effect))


def _first_step(site: TrainingSite, candidate: Candidate) -> list[Params]:
    asked = lesson.part(replace(site.comparison, candidate=candidate))
    clip_norm = lesson.course_of(site.comparison).clip_norm
    return [params for params, _ in asked.steps(lesson.groups(asked), clip_norm, 1)]


# -- Schedule --------------------------------------------------------------------------


def _counted(by: int) -> Around:
    """The schedule's count moved for the step, and back after it."""

    def around(step: Step, call: Call) -> tuple[TrainState, StepReport]:
        state, report = step(*call._replace(state=_with_count(call.state, by)))
        return _with_count(state, -by), report

    return around


def _with_count(state: TrainState, by: int) -> TrainState:
    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def changed(node: Any) -> Any:
        return node._replace(count=node.count + by) if is_schedule(node) else node

    return state._replace(moments=jax.tree.map(changed, state.moments, is_leaf=is_schedule))


def _schedule(site: Site) -> Iterator[Variant]:
    for by, words in ((-1, "earlier"), (1, "later")):
        yield from _around(f"with the schedule one step {words}", _counted(by))(site)


# -- Clipping --------------------------------------------------------------------------


def _unclipped(site: Site) -> Iterator[Variant]:
    """Moments that make up for a missing or another clipping.

    With g the gradient, c what global clipping scales it with and d what the hypothesis
    says the step scales it with, the step computes β₁m + (1 − β₁)dg. Given
    m + (1 − β₁)/β₁ (c − d)g in place of m it computes what it should, and likewise for v.
    """

    if not isinstance(site, TrainingSite):
        return
    gradients = site.candidate.training.gradients
    for words, wrong in (("no clipping", _none), ("clipping of each parameter", _each_parameter)):

        def around(step: Step, call: Call, wrong: Scales = wrong) -> tuple[TrainState, StepReport]:
            _, found = gradients(*call)
            norm, limit = float(optax.tree.norm(found)), call.settings.clip_norm
            right = min(1.0, limit / norm) if norm else 1.0
            return step(*call._replace(state=_with_moments(call, found, right, wrong(found, limit))))

        yield from _around(f"with moments that make up for {words}", around)(site)


Scales = Callable[[Params, float], Params]
"""What each parameter's gradient is multiplied by, given the gradients and the clip norm."""


def _with_moments(call: Call, gradients: Params, right: float, wrong: Params) -> TrainState:
    b1, b2 = call.settings.beta1, call.settings.beta2

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def changed(node: Any) -> Any:
        if not is_adam(node):
            return node
        mu = {n: m + (1 - b1) / b1 * (right - wrong[n]) * gradients[n] for n, m in node.mu.items()}
        nu = {n: v + (1 - b2) / b2 * (right**2 - wrong[n] ** 2) * gradients[n] ** 2 for n, v in node.nu.items()}
        return node._replace(mu=mu, nu=nu)

    return call.state._replace(moments=jax.tree.map(changed, call.state.moments, is_leaf=is_adam))


def _none(gradients: Params, _: float) -> Params:
    return dict.fromkeys(gradients, 1.0)


def _each_parameter(gradients: Params, limit: float) -> Params:
    norms = {name: float(jnp.linalg.norm(gradient.ravel())) for name, gradient in gradients.items()}
    return {name: min(1.0, limit / norm) if norm else 1.0 for name, norm in norms.items()}


# -- Settings --------------------------------------------------------------------------


def _setting(*names: str) -> Callable[[Site], Iterator[Variant]]:
    """One setting after the other as the reference has it."""

    def variants(site: Site) -> Iterator[Variant]:
        settings = site.candidate.training.settings
        for name in names:
            agreed = getattr(SETTINGS, name)
            if getattr(settings, name) != agreed:
                changed = replace(settings, **{name: agreed})
                yield Variant(f"with {name} {agreed}", trained(site.candidate, settings=changed))

    return variants


_OPTIMIZER = "in jaxgpt/optimizer.py"
_SETTINGS = "give both sides the same training settings: {}"

REPAIRS: tuple[Repair, ...] = (
    Repair("wrong betas of AdamW", _SETTINGS.format("beta1, beta2"), RUNGS, _setting("beta1", "beta2")),
    Repair("wrong weight decay", _SETTINGS.format("weight_decay"), RUNGS, _setting("weight_decay")),
    Repair("wrong clip norm", _SETTINGS.format("clip_norm"), RUNGS, _setting("clip_norm")),
    Repair(
        "wrong learning-rate schedule",
        _SETTINGS.format("learning_rate, schedule, warmup_steps, steps, decay_fraction, final_learning_rate"),
        RUNGS,
        _setting("learning_rate", "schedule", "warmup_steps", "steps", "decay_fraction", "final_learning_rate"),
    ),
    Repair(
        "learning-rate schedule off by one",
        f"the first step has the rate of count 0, {_OPTIMIZER}",
        RUNGS,
        _schedule,
    ),
    Repair(
        "decay applied to norms and biases",
        f"decay matrices only: the mask of optax.adamw {_OPTIMIZER}",
        RUNGS,
        _around("with the decay of norms and biases given back", _undecayed),
    ),
    Repair(
        "weight decay missing",
        f"decay matrices by learning rate times weight_decay, {_OPTIMIZER}",
        RUNGS,
        _around("with decay applied after the step", _decayed),
    ),
    Repair(
        "coupled (L2) weight decay",
        f"decay the parameters, not the gradients: AdamW instead of Adam with L2, {_OPTIMIZER}",
        RUNGS,
        _coupled,
    ),
    Repair(
        "gradients not clipped by their global norm",
        f"clip by the norm of all gradients together, before AdamW, {_OPTIMIZER}",
        RUNGS,
        _unclipped,
    ),
)
"""Narrow ones first."""
