"""What a hypothesis about the loss takes away from the candidate's answers, and what it puts there.

A hypothesis says what a wrong answer would be. The candidate's answer is corrected by
the difference between right and hypothesised, both computed by the reference on the
same inputs: unless the candidate makes just this mistake, the answer stays wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oracle import lesson, training_probe, training_reference
from oracle.candidate import Candidate
from oracle.repairs.training import adamw
from oracle.rungs import loss
from oracle.site import Site
from oracle.training_site import TrainingSite, trained
from torchref import training

Arrays = Mapping[str, np.ndarray]
NEARER = 0.5
"""A hypothesis is worth a trial if the answer is at least so much nearer to it than to what is right."""


@dataclass(frozen=True)
class Answer:
    """A mean loss and its gradient."""

    loss: float
    gradients: Arrays

    def __add__(self, other: "Answer") -> "Answer":
        return Answer(self.loss + other.loss, {n: g + other.gradients[n] for n, g in self.gradients.items()})

    def times(self, factor: float) -> "Answer":
        """Loss and gradient multiplied."""
        return Answer(self.loss * factor, {name: factor * gradient for name, gradient in self.gradients.items()})


def is_of_losses(site: Site) -> bool:
    """A difference of losses or gradients, in a model small enough to compute its gradients at will."""
    return (
        isinstance(site, TrainingSite)
        and site.rung != "optimizer"
        and not site.finding.tap.startswith(loss.BATCH)
        and not training_probe.is_large(site.candidate.config)
    )


def batches(site: Site) -> list[training.Batch]:
    """The micro-batches of the step whose gradient is compared."""
    return lesson.gradient_batches(lesson.whole(site.comparison))


def observed(site: Site) -> Answer:
    """What the candidate answers."""
    return Answer(*lesson.whole(site.comparison).gradients(site.once(batches)))


def right(site: Site) -> Answer:
    """What the reference answers in float64."""
    asked = lesson.whole(site.comparison)
    truth, _ = lesson.gradients(site.comparison.reference, asked.corpus, asked.settings)
    return Answer(*truth)


def differentiated(site: Site, share: Callable[[torch.Tensor, training.Batch], torch.Tensor]) -> list[Answer]:
    """Of each micro-batch the scalar that `share` makes of its logits (B, T, V), and its gradient."""
    decoder = site.comparison.reference.truth.decoder
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    answers: list[Answer] = []
    for batch in site.once(batches):
        value = share(decoder(batch.ids, positions=batch.positions, segments=batch.segments), batch)
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        answers.append(Answer(float(value.detach()), training_reference.named(dict(zip(names, found, strict=True)))))
    return answers


def summed(answers: Sequence[Answer], weights: Sequence[float]) -> Answer:
    """Σ weight · answer."""
    first, *others = (answer.times(weight) for answer, weight in zip(answers, weights, strict=True))
    for other in others:
        first += other
    return first


# -- Distances -------------------------------------------------------------------------


def distance(a: Arrays, b: Arrays) -> float:
    """Of two sets of gradients; what one of them lacks counts as zero there."""
    squares = (float(np.square(np.asarray(a.get(name, 0.0), np.float64) - b[name]).sum()) for name in b)
    return sum(squares) ** 0.5


def loss_is(site: Site, wrong: float) -> bool:
    """The mean loss is the hypothesised rather than the right one."""
    mine = site.once(observed).loss
    return abs(mine - wrong) <= NEARER * abs(mine - site.once(right).loss)


def gradients_are(site: Site, wrong: Arrays) -> bool:
    """The gradients are the hypothesised rather than the right ones."""
    mine = site.once(observed).gradients
    fits = all(name in mine and mine[name].shape == wrong[name].shape for name in wrong)
    return fits and distance(mine, wrong) <= NEARER * distance(mine, site.once(right).gradients)


def steps_follow_own(site: Site) -> bool:
    """The candidate's steps go where its own gradients lead rather than the right ones.

    Adam's first step tells their signs only; what rounding did to them shows in the later ones.
    """
    recipe, right = adamw.agreed(site), site.once(adamw.course)
    own = adamw.course_with(site, site.candidate.training)
    by_own, by_right = (
        sum(adamw.course_distance(site, course, recipe, tap) ** 2 for tap in right.params[0]) for course in (own, right)
    )
    return by_own <= NEARER**2 * by_right


# -- Corrections -----------------------------------------------------------------------

Change = Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]
"""From what the candidate answers to what it should."""


def answering(site: TrainingSite, change: Change, *, in_step: bool = False) -> dict[str, Any]:
    """The candidate's gradients changed, and its step too where that makes the same mistake: as told, or as seen."""
    function = site.candidate.training.gradients

    def repaired(*given: Any) -> Any:
        value, found = function(*given)
        return change(value, found)

    in_step = in_step or "step" in site.wrong_functions()
    step = {"step": adamw.with_gradients_of(site, function)} if in_step else {}
    return {"gradients": repaired, **step}


def moved(site: Site, wrong: Answer) -> Change | None:
    """Adds what is right and takes away what is wrong, where the answer is the hypothesised; None if nowhere.

    An answer that is too large is first made smaller, as its rounding is too large as well.
    """
    true = site.once(right)
    is_loss, are_gradients = loss_is(site, wrong.loss), gradients_are(site, wrong.gradients)
    if not is_loss and not are_gradients:
        return None
    of_loss = _share(abs(true.loss), abs(wrong.loss)) if is_loss else 1.0
    by = true.loss - of_loss * wrong.loss if is_loss else 0.0
    share = _share(distance({}, true.gradients), distance({}, wrong.gradients)) if are_gradients else 1.0
    moves = {
        name: (true.gradients[name] - share * gradient).astype(np.float32)
        for name, gradient in wrong.gradients.items()
        if are_gradients
    }
    return lambda value, found: (of_loss * value + by, {n: share * g + moves.get(n, 0.0) for n, g in found.items()})


def _share(true: float, wrong: float) -> float:
    return true / wrong if 0.0 < true < wrong else 1.0


def divided(site: Site, factor: float) -> Change | None:
    """Divides loss and gradients, each where it is so many times too large; None if neither is."""
    mine, true = site.once(observed), site.once(right)
    of_loss = factor if _is_times(mine.loss / true.loss, factor) else 1.0
    wrong = true.times(factor).gradients
    is_so = gradients_are(site, wrong) and _is_times(scale(mine.gradients, true.gradients), factor)
    of_gradients = factor if is_so else 1.0
    if of_loss == of_gradients == 1.0:
        return None
    return lambda value, found: (value / of_loss, {name: g / of_gradients for name, g in found.items()})


def _is_times(measured: float, factor: float) -> bool:
    return abs(measured / factor - 1) <= AS_GOOD_AS


AS_GOOD_AS = 3e-3
"""Two factors that differ by more are told apart in any dtype."""


def scale(a: Arrays, b: Arrays) -> float:
    """The factor by which all of b comes nearest to a."""
    return sum(float((np.asarray(a[name], np.float64) * b[name]).sum()) for name in b) / distance({}, b) ** 2


def changed(site: TrainingSite, change: Change, *, in_step: bool = False) -> Candidate:
    """The candidate with other gradients."""
    return trained(site.candidate, **answering(site, change, in_step=in_step))
