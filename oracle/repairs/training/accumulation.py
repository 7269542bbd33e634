"""Repairs of a step's mean: how micro-batches are weighed and summed, and what becomes of their gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.training import corrections
from oracle.repairs.training.corrections import Answer, Change
from oracle.repairs.training.losses import nats
from oracle.rungs import gradients, loss
from oracle.site import Site
from oracle.training_site import TrainingSite

RUNGS = (loss.NAME, gradients.NAME)


@dataclass(frozen=True)
class Parts:
    """Of each micro-batch the summed loss and its gradient: of trained places, and of all."""

    trained: Sequence[Answer]
    everything: Sequence[Answer]
    tokens: Sequence[int]
    """Trained ones."""
    real: Sequence[int]
    """Places that hold a token."""
    places: int
    """B · T."""

    @property
    def total(self) -> int:
        """Trained tokens of the step."""
        return sum(self.tokens)


def _parts(site: Site) -> Parts:
    batches = site.once(corrections.batches)
    return Parts(
        corrections.differentiated(site, lambda logits, batch: (nats(logits, batch) * batch.mask).sum()),
        corrections.differentiated(site, lambda logits, batch: nats(logits, batch).sum()),
        [max(1, batch.trained) for batch in batches],
        [max(1, int((batch.segments > 0).sum())) for batch in batches],
        batches[0].mask.numel(),
    )


def _change(site: TrainingSite, change: Change | None, words: str, *, in_step: bool = False) -> Iterator[Variant]:
    if change is not None:
        yield Variant(words, corrections.changed(site, change, in_step=in_step))


Hypotheses = Callable[[Parts], Iterator[tuple[str, Answer]]]
"""What the change is called, and the answer that the candidate may have given."""


def _moved(hypotheses: Hypotheses) -> Callable[[Site], Iterator[Variant]]:
    """Repairs that put right − hypothesised on the candidate's answer."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, TrainingSite) and _applies(site):
            for words, wrong in hypotheses(site.once(_parts)):
                yield from _change(site, corrections.moved(site, wrong), words)

    return variants


def _applies(site: TrainingSite) -> bool:
    """Not where the losses of tokens are wrong already: what follows from that is no fault of the mean."""
    return corrections.is_of_losses(site) and site.finding.tap != loss.TOKENS


# -- Means -----------------------------------------------------------------------------


def _mean_of_means(parts: Parts) -> Iterator[tuple[str, Answer]]:
    A = len(parts.tokens)
    weights = [1 / (A * count) for count in parts.tokens]
    yield "with the sum divided once by all trained tokens", corrections.summed(parts.trained, weights)


def _sum_of_means(parts: Parts) -> Iterator[tuple[str, Answer]]:
    wrong = corrections.summed(parts.trained, [1 / count for count in parts.tokens])
    yield "with the sum divided once by all trained tokens", wrong


def _over_all_places(parts: Parts) -> Iterator[tuple[str, Answer]]:
    A, words = len(parts.tokens), "with the mean of the places whose mask is 1"
    yield words, corrections.summed(parts.everything, [1 / (A * parts.places)] * A)
    yield words, corrections.summed(parts.trained, [1 / (A * count) for count in parts.real])


def _unmasked(parts: Parts) -> Iterator[tuple[str, Answer]]:
    yield (
        "with the losses of trained places alone",
        corrections.summed(parts.everything, [1 / parts.total] * len(parts.tokens)),
    )


def _one_only(parts: Parts) -> Iterator[tuple[str, Answer]]:
    """The last micro-batch, or the first, with its own count or that of the step."""
    A = len(parts.tokens)
    for at in (A - 1, 0) if A > 1 else ():
        for count in dict.fromkeys((parts.total, parts.tokens[at], A * parts.tokens[at])):
            weights = [float(number == at) / count for number in range(A)]
            yield "with the sum over all micro-batches", corrections.summed(parts.trained, weights)


def _divided(factors: Callable[[Parts], Iterator[float]]) -> Callable[[Site], Iterator[Variant]]:
    """Repairs that divide: what is a multiple of the truth has its rounding multiplied as well."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, TrainingSite) and _applies(site):
            for factor in dict.fromkeys(factors(site.once(_parts))):
                yield from _change(site, corrections.divided(site, factor), f"divided by {factor:.6g}")

    return variants


def _undivided(parts: Parts) -> Iterator[float]:
    """Not by the tokens, or not by the number of micro-batches."""
    yield float(parts.total)
    yield float(len(parts.tokens))
    yield parts.total / len(parts.tokens)


def _padded_count(parts: Parts) -> Iterator[float]:
    """By all places, or all tokens, in place of the trained ones."""
    yield parts.total / (len(parts.tokens) * parts.places)
    yield parts.total / sum(parts.real)


# -- Gradients -------------------------------------------------------------------------


def _scaled(site: Site) -> Iterator[Variant]:
    """All gradients the same multiple of the truth."""
    if not isinstance(site, TrainingSite) or site.rung != gradients.NAME or not _applies(site):
        return
    mine, true = (site.once(answer).gradients for answer in (corrections.observed, corrections.right))
    if any(name not in mine or mine[name].shape != true[name].shape for name in true):
        return
    factor = corrections.scale(mine, true)
    if factor:
        yield from _change(site, corrections.divided(site, factor), f"divided by {factor:.6g}")


def _untrained(site: Site) -> Iterator[Variant]:
    """Gradients that are exactly zero, or not there, and ought not to be."""
    if not isinstance(site, TrainingSite) or site.rung != gradients.NAME or not _applies(site):
        return
    mine, true = (site.once(answer).gradients for answer in (corrections.observed, corrections.right))
    zero = [name for name in true if not np.any(mine.get(name, 0.0)) and np.any(true[name])]
    if site.finding.tap in zero and len(zero) < len(true):
        moves = {name: jnp.asarray(true[name], jnp.float32) for name in zero}
        words = f"with the gradient of {', '.join(zero[:3])}{', …' if len(zero) > 3 else ''}"
        yield from _change(
            site, lambda value, found: (value, dict(found) | {n: moves[n] + found.get(n, 0.0) for n in zero}), words
        )


HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def _narrow(site: Site) -> Iterator[Variant]:
    """Gradients that all are numbers of a narrow dtype, and differ from the right ones by the rounding of sums."""
    if not isinstance(site, TrainingSite) or site.rung != gradients.NAME or not _applies(site):
        return
    mine, parts = site.once(corrections.observed).gradients, site.once(_parts)
    for dtype, half_ulp in HALF_ULP.items():
        moves = {name: _lost(site, parts, name, dtype, half_ulp) for name in mine}
        if all(move is not None for move in moves.values()):
            # A step's loss and norm hardly tell such rounding, but its moves do.
            in_step = site.once(corrections.steps_follow_own)
            yield from _change(site, _adding(moves), f"with what {dtype} lost", in_step=in_step)
            return


def _adding(moves: Mapping[str, np.ndarray | None]) -> Change:
    return lambda value, found: (value, {name: gradient + moves[name] for name, gradient in found.items()})


def _lost(site: Site, parts: Parts, name: str, dtype: str, half_ulp: float) -> np.ndarray | None:
    """What rounding took of a gradient; None if it is something else."""
    mine, true = site.once(corrections.observed).gradients[name], site.once(corrections.right).gradients.get(name)
    if true is None or true.shape != mine.shape:
        return None
    rounded = np.asarray(jnp.asarray(mine, dtype), np.float32)
    if not (rounded == mine).all():
        return None
    # Each partial sum is rounded, and each part.
    pieces = [np.asarray(part.gradients[name]) / parts.total for part in parts.trained]
    sums = sum(np.abs(total) for total in np.cumsum(pieces, axis=0)) + sum(np.abs(piece) for piece in pieces)
    floor = 1e-5 * float(np.abs(true).max(initial=0.0)) + 1e-8
    near = np.abs(mine - true) <= 2 * half_ulp * sums + floor
    return np.asarray(true - mine, np.float32) if near.all() else None


# -- All of them -----------------------------------------------------------------------

_STEP = "(jaxgpt/train_step.py)"
_ONCE = f"divide the summed losses once, by the trained tokens of the whole step {_STEP}"

REPAIRS: tuple[Repair, ...] = (
    Repair("gradient accumulation normalised per micro-batch", _ONCE, RUNGS, _moved(_mean_of_means)),
    Repair("micro-batches summed without dividing", _ONCE, RUNGS, _divided(_undivided)),
    Repair("micro-batches summed without dividing", _ONCE, RUNGS, _moved(_sum_of_means)),
    Repair("mean over all places instead of the trained", _ONCE, RUNGS, _divided(_padded_count)),
    Repair("mean over all places instead of the trained", _ONCE, RUNGS, _moved(_over_all_places)),
    Repair(
        "untrained places counted in the loss",
        "multiply the losses of tokens by the batch's mask before they are summed: masked_sum in jaxgpt/loss.py",
        RUNGS,
        _moved(_unmasked),
    ),
    Repair(
        "only one micro-batch's gradient kept",
        f"add the gradients of all micro-batches of a step {_STEP}",
        RUNGS,
        _moved(_one_only),
    ),
    Repair(
        "parameter not trained",
        f"differentiate by every parameter: no stop_gradient, no mask of trained parameters {_STEP}",
        (gradients.NAME,),
        _untrained,
    ),
    Repair(
        "gradients accumulated in low precision",
        f"sum the gradients of micro-batches in float32 {_STEP}",
        (gradients.NAME,),
        _narrow,
    ),
    Repair(
        "gradients scaled by a constant",
        f"take the gradient of the mean loss, multiplied by nothing {_STEP}",
        (gradients.NAME,),
        _scaled,
    ),
)
"""Narrow ones first."""
