"""Learning rates that a program may have used in place of the agreed ones."""

import math
from collections.abc import Iterator
from dataclasses import replace

from oracle import lesson, training_reference
from oracle.site import Site
from torchref.training import Recipe, learning_rate

Rates = tuple[float, ...]


def agreed(site: Site) -> Recipe:
    """What both sides were told."""
    return training_reference.recipe(lesson.part(site.comparison).settings)


def rates(recipe: Recipe, *, by: int = 0, times: int = 1) -> Rates:
    """Of each step, the count moved or multiplied."""
    last = max(recipe.steps - 1, 0)
    return tuple(learning_rate(recipe, min(max(step * times + by, 0), last)) for step in range(recipe.steps))


def _decaying(recipe: Recipe, kept: list[float], final: float) -> Rates:
    """Warm-up as agreed, then from the highest rate to `final` of it; `kept` is 1 at its end and 0 at the last step."""
    ramp, highest = min(recipe.warmup_steps, max(recipe.steps - 1, 1)), recipe.learning_rate
    warm = rates(recipe)[:ramp]
    return (*warm, *(highest * (final + (1 - final) * share) for share in kept))


def _past(recipe: Recipe, falling: int) -> list[float]:
    """How much of the decay is past in each step after the warm-up."""
    ramp = min(recipe.warmup_steps, max(recipe.steps - 1, 1))
    return [min(1.0, number / max(1, falling)) for number in range(recipe.steps - ramp)]


def _cosine(past: list[float]) -> list[float]:
    return [0.5 + 0.5 * math.cos(math.pi * share) for share in past]


def to_zero(site: Site) -> Iterator[Rates]:
    """The final rate is 0."""
    yield rates(replace(agreed(site), final_learning_rate=0.0))


def linear(site: Site) -> Iterator[Rates]:
    """A straight line instead of a cosine, to the final rate or to 0."""
    recipe = agreed(site)
    line = [1 - share for share in _past(recipe, recipe.steps - 1 - recipe.warmup_steps)]
    yield _decaying(recipe, line, recipe.final_learning_rate)
    yield _decaying(recipe, line, 0.0)


def constant(site: Site) -> Iterator[Rates]:
    """No decay, with or without warm-up."""
    recipe = agreed(site)
    yield rates(replace(recipe, schedule="constant"))
    yield rates(replace(recipe, schedule="constant", warmup_steps=0))


def cold(site: Site) -> Iterator[Rates]:
    """No warm-up: the decay begins at the first step, or where it should."""
    recipe = agreed(site)
    ramp = min(recipe.warmup_steps, recipe.steps)
    yield rates(replace(recipe, warmup_steps=0))
    yield (recipe.learning_rate,) * ramp + rates(recipe)[ramp:]


def in_micro_batches(site: Site) -> Iterator[Rates]:
    """The count grows by one with each micro-batch, seen before or after those of the step."""
    recipe = agreed(site)
    times = lesson.part(site.comparison).settings.accumulate
    for by in (0, times - 1, times):
        yield rates(recipe, by=by, times=times)
    decay = [min(1.0, share * times) for share in _past(recipe, recipe.steps - 1 - recipe.warmup_steps)]
    yield _decaying(recipe, _cosine(decay), recipe.final_learning_rate)


def off_by_one(site: Site) -> Iterator[Rates]:
    """One step early or late, altogether or only at one end of the warm-up or the decay."""
    recipe = agreed(site)
    ramp, highest, final = recipe.warmup_steps, recipe.learning_rate, recipe.final_learning_rate
    right = rates(recipe)
    yield rates(recipe, by=1)
    yield (0.0, *right[:-1])
    yield rates(recipe, by=-1)
    # Ramps that begin at 0, or that reach the highest rate one step before the decay begins.
    for warm in (
        [step / (ramp + 1) for step in range(ramp)],
        [step / max(1, ramp) for step in range(ramp)],
        [(step + 1) / max(1, ramp) for step in range(ramp)],
    ):
        yield (*(highest * share for share in warm), *right[ramp:])
        yield from _ends(recipe, tuple(highest * share for share in warm), final)
    yield from _ends(recipe, right[:ramp], final)


def _ends(recipe: Recipe, warm: Rates, final: float) -> Iterator[Rates]:
    """A decay that would end one step after the last, or that ends one step before it."""
    left = recipe.steps - 1 - recipe.warmup_steps
    for falling in (left + 1, left - 1):
        decay = _decaying(recipe, _cosine(_past(recipe, falling)), final)
        yield (*warm, *decay[len(warm) :])


def scaled(site: Site) -> Iterator[Rates]:
    """All rates so many times too large, as the candidate tells them or as often happens."""
    recipe = agreed(site)
    for factor in (0.1, 10.0, 0.5, 2.0):
        yield tuple(factor * rate for rate in rates(recipe))
