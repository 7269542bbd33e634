"""Training steps by their definitions in float64, with room for one mistake, beside the candidate's own steps.

What a mistake did to a parameter is the difference between two such replays on the
same parameters and gradients: the right one and the hypothesised one. A candidate that
makes just this mistake is right once the difference is put on top of its steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import lesson, training, training_probe, training_reference
from oracle.site import Site
from oracle.training import Gradients, Step
from oracle.training_site import TrainingSite
from torchref.training import learning_rate

Params = Mapping[str, np.ndarray]

# -- One update ------------------------------------------------------------------------


def by_global_norm(gradient: np.ndarray, norm: float, limit: float) -> np.ndarray:
    """Pascanu et al. 2013, algorithm 1; `norm` is that of all gradients together."""
    return gradient * min(1.0, limit / norm) if norm else gradient


def adam(m: np.ndarray, v: np.ndarray, count: int, recipe: "Recipe") -> np.ndarray:
    """The direction of Kingma & Ba 2015, algorithm 1; `count` is 1 in the first step."""
    unbiased = np.sqrt(v / (1 - recipe.beta2**count))
    return m / (1 - recipe.beta1**count) / (unbiased + recipe.epsilon)


def matrices(_: str, parameter: np.ndarray) -> bool:
    """Norms and biases do not decay."""
    return parameter.ndim > 1


@dataclass(frozen=True)
class Recipe:
    """How to update; the defaults are right."""

    rates: tuple[float, ...]
    """Of each step."""
    beta1: float
    beta2: float
    clip_norm: float
    weight_decay: float
    epsilon: float = 1e-8
    clip: Callable[[np.ndarray, float, float], np.ndarray] = by_global_norm
    direction: Callable[[np.ndarray, np.ndarray, int, "Recipe"], np.ndarray] = adam
    decays: Callable[[str, np.ndarray], bool] = matrices
    decay_rates: tuple[float, ...] = ()
    """What decay is multiplied by in each step, if not the learning rate."""
    coupled: Literal["", "before", "after"] = ""
    """Decay is added to the gradients, before or after clipping."""
    decay_last: bool = False
    """Decay is of the updated parameters."""
    forgets: bool = False
    """Moments begin at zero in each step."""

    @property
    def of_decay(self) -> tuple[float, ...]:
        """What decay is multiplied by in each step."""
        return self.decay_rates or self.rates

    def norm(self, params: Params, gradients: Params) -> float:
        """What clipping is measured by: the global norm, with the decay where it is added before."""
        if self.coupled != "before":
            return global_norm(gradients)
        return global_norm({name: self.with_decay(name, params[name], g) for name, g in gradients.items()})

    def with_decay(self, name: str, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """L2 regularisation's gradient on top."""
        return gradient + self.weight_decay * self.decays(name, parameter) * np.asarray(parameter, np.float64)


def agreed(site: Site) -> Recipe:
    """What both sides were told."""
    settings: TrainSettings = lesson.scaled(
        lesson.part(site.comparison).settings, lesson.course_of(site.comparison).clip_norm
    )
    recipe = training_reference.recipe(settings)
    rates = tuple(learning_rate(recipe, step) for step in range(settings.steps))
    return Recipe(rates, settings.beta1, settings.beta2, settings.clip_norm, settings.weight_decay)


@dataclass
class Replay:
    """Moments of some parameters."""

    recipe: Recipe
    count: int = 0
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def updates(self, params: Params, gradients: Params, norm: float) -> dict[str, np.ndarray]:
        """What the next step adds to each parameter; `norm` is that of all gradients together."""
        found = {name: self._update(name, array, gradients[name], norm) for name, array in params.items()}
        self.count += 1
        return found

    def _update(self, name: str, parameter: np.ndarray, gradient: np.ndarray, norm: float) -> np.ndarray:
        r, step = self.recipe, min(self.count, len(self.recipe.rates) - 1)
        decay = 0.0 if r.coupled else r.weight_decay * r.decays(name, parameter)
        gradient = r.with_decay(name, parameter, gradient) if r.coupled == "before" else gradient
        gradient = r.clip(gradient, norm, r.clip_norm)
        gradient = r.with_decay(name, parameter, gradient) if r.coupled == "after" else gradient
        m, v = (0.0, 0.0) if r.forgets else self.moments.get(name, (0.0, 0.0))
        m, v = r.beta1 * m + (1 - r.beta1) * gradient, r.beta2 * v + (1 - r.beta2) * np.square(gradient)
        self.moments[name] = m, v
        moved = -r.rates[step] * r.direction(m, v, self.count + 1, r)
        return moved - r.of_decay[step] * decay * (parameter + moved if r.decay_last else parameter)


# -- The candidate's own steps ---------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What the candidate did: parameters before each step and after the last, gradients there, rates it told."""

    params: Sequence[Params]
    gradients: Sequence[Params]
    norms: Sequence[float]
    rates: Sequence[float]


def course(site: Site) -> Course:
    """The candidate's steps, and the right gradients on its way."""
    asked = lesson.part(site.comparison)
    groups = lesson.groups(asked)
    answers = list(asked.steps(groups, lesson.course_of(site.comparison).clip_norm, asked.settings.steps))
    params = [{name: np.asarray(array) for name, array in asked.master.items()}, *(found for found, _ in answers)]
    found = _on_the_way(site, params, training.Training(gradients=site.once(right_gradients)))
    return Course(
        params, found, [global_norm(g) for g in found], [float(report.learning_rate) for _, report in answers]
    )


def _on_the_way(site: Site, params: Sequence[Params], way: training.Training) -> list[Params]:
    """The gradients that a way of training finds before each of the candidate's steps."""
    asked = lesson.part(site.comparison)
    groups = lesson.groups(asked)
    return [
        replace(asked, candidate=replace(asked.candidate, dtype="float32", stored=before, training=way)).gradients(
            groups[number % len(groups)]
        )[1]
        for number, before in enumerate(params[:-1])
    ]


AGREED = 1e-4
"""Relative error of a gradient in float32 from which it is another one."""


def right_gradients(site: Site) -> Gradients:
    """The product's own where the reference agrees, since they round as the candidate's do; else the reference's.

    A mistake in the product's own code is in its gradients, whatever the candidate was given instead.
    """
    asked, decoder = lesson.part(site.comparison), lesson.part_of_truth(site.comparison)
    batches = lesson.groups(asked)[0]
    own = replace(asked, candidate=replace(asked.candidate, dtype="float32", training=training.Training()))
    _, found = own.gradients(batches)
    _, true = training_reference.gradients(decoder, batches)
    apart = {name: found[name] - array for name, array in true.items()}
    if global_norm(apart) <= AGREED * global_norm(true):
        return training.gradients
    return training_reference.gradients_of(decoder)


def course_with(site: Site, way: training.Training) -> Course:
    """`course` with the gradients that a way of training finds."""
    own = site.once(course)
    found = _on_the_way(site, own.params, way)
    return replace(own, gradients=found, norms=[global_norm(g) for g in found])


def global_norm(gradients: Params) -> float:
    """Of all gradients as one vector."""
    return sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in gradients.values()) ** 0.5


def distance(site: Site, recipe: Recipe, tap: str) -> float:
    """How far one parameter's updates were from the recipe's, over all steps; rounding of tiny gradients aside."""
    return course_distance(site, site.once(course), recipe, tap)


def course_distance(site: Site, own: Course, recipe: Recipe, tap: str) -> float:
    """See `distance`, with the gradients of a course of its own."""
    replay, total = Replay(recipe), 0.0
    weight = lesson.course_of(site.comparison).truth[-1].divisors[tap]
    for number, (before, after) in enumerate(zip(own.params[:-1], own.params[1:], strict=True)):
        if tap not in after or after[tap].shape != before[tap].shape:
            return float("inf")
        wide = {tap: before[tap].astype(np.float64)}
        gradients = own.gradients[number]
        norm = recipe.norm(before, gradients) if recipe.coupled else own.norms[number]
        update = replay.updates(wide, {tap: gradients[tap].astype(np.float64)}, norm)[tap]
        total += float(np.square(weight * (after[tap] - wide[tap] - update)).sum())
    return total**0.5


# -- Corrected steps -------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """What a step does otherwise; the recipes are alike in everything else."""

    right: Recipe
    wrong: Recipe
    of_rates: bool = True
    """The rates that are told are wrong as well."""
    of_updates: bool = True
    stored: str = ""
    """The dtype to which parameters are rounded after each step, if not float32."""
    gradients: Gradients | None = None
    """Where the step takes its gradients, if not the right ones."""


def undone(site: Site, mistake: Mistake) -> Step:
    """The candidate's step with right − wrong on top of its parameters and rates."""
    step, right = site.candidate.training.step, site.once(right_gradients)
    replays: list[Replay] = []

    def repaired(config: Any, settings: Any, dtype: str, state: TrainState, batches: Any) -> Any:
        if int(state.step) == 0 or not replays:
            replays[:] = Replay(mistake.right), Replay(mistake.wrong)
        number = replays[0].count
        agreed_on = training_probe.settings_for(config, training_probe.SETTINGS)
        own, other = _gradients(right, mistake, (config, agreed_on, dtype, _bare(state), batches))
        before = {name: np.asarray(array, np.float64) for name, array in state.params.items()}
        moves = [
            replay.updates(before, found, replay.recipe.norm(before, found))
            for replay, (_, found) in zip(replays, (own, other), strict=True)
        ]
        new, report = step(config, settings, dtype, state, batches)
        if mistake.stored:
            new = new._replace(
                params={
                    n: _unrounded(array, before[n] + moves[0][n], mistake.stored) for n, array in new.params.items()
                }
            )
        elif mistake.of_updates:
            new = new._replace(params={n: _moved(array, moves[0][n] - moves[1][n]) for n, array in new.params.items()})
        return new, _told(report, mistake, number, own[0] - other[0])

    return repaired


def _bare(state: TrainState) -> TrainState:
    """What gradients are computed of; one compilation for all optimizers."""
    return state._replace(moments=(), step=jnp.int32(0))


def _gradients(right: Gradients, mistake: Mistake, given: tuple[Any, ...]) -> list[tuple[float, dict[str, np.ndarray]]]:
    """The right ones, and those the step takes."""
    answers = [right(*given)]
    answers.append(mistake.gradients(*given) if mistake.gradients else answers[0])
    return [(float(value), {n: np.asarray(g, np.float64) for n, g in found.items()}) for value, found in answers]


def _moved(array: Any, by: np.ndarray) -> Any:
    return jnp.asarray(np.asarray(array, np.float64) + by, jnp.float32)


ULPS = {"bfloat16": (2.0**-7, jnp.bfloat16), "float16": (2.0**-10, jnp.float16)}
"""At 1, and the dtype."""


def is_stored_in(array: np.ndarray, dtype: str) -> bool:
    """Every number is one of the dtype's."""
    return bool((np.asarray(array, np.float32) == np.asarray(jnp.asarray(array, ULPS[dtype][1]), np.float32)).all())


def _unrounded(array: Any, full: np.ndarray, dtype: str) -> Any:
    """The full number wherever the array has it to within the dtype's rounding."""
    rounded = np.asarray(array, np.float64)
    near = np.abs(rounded - full) <= 1.1 * ULPS[dtype][0] * np.abs(full)
    return jnp.asarray(np.where(near & is_stored_in(rounded, dtype), full, rounded), jnp.float32)


def _told(report: StepReport, mistake: Mistake, number: int, of_loss: float) -> StepReport:
    last = len(mistake.right.rates) - 1
    by = mistake.right.rates[min(number, last)] - mistake.wrong.rates[min(number, last)] if mistake.of_rates else 0.0
    rate = jnp.float32(float(report.learning_rate) + by)
    return report._replace(learning_rate=rate, loss=jnp.float32(float(report.loss) + of_loss))


def with_gradients_of(site: TrainingSite, function: Gradients) -> Step:
    """The candidate's step as if its gradients were the right ones instead of that function's."""
    right = site.once(agreed)
    return undone(site, Mistake(right, right, gradients=function))
