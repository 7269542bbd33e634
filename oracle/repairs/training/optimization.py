"""Repairs of the training step: its settings, and what it does otherwise than AdamW with clipping and a schedule."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.training import adamw, schedule
from oracle.repairs.training.adamw import Mistake, Recipe
from oracle.repairs.training.corrections import NEARER
from oracle.rungs import optimizer
from oracle.site import Site
from oracle.training_probe import SETTINGS
from oracle.training_site import TrainingSite, trained

RUNGS = (optimizer.NAME,)
Variants = Callable[[Site], Iterator[Variant]]
MOST = 2
"""Variants of one repair that are tried: those that come nearest."""
EXACT = 1e-6
"""Two rates differ by more, in units of the highest."""

# -- Settings --------------------------------------------------------------------------


def _setting(*names: str) -> Variants:
    """One setting after the other as the reference has it."""

    def variants(site: Site) -> Iterator[Variant]:
        settings = site.candidate.training.settings
        for name in names:
            agreed = getattr(SETTINGS, name)
            if getattr(settings, name) != agreed:
                changed = replace(settings, **{name: agreed})
                yield Variant(f"with {name} {agreed}", trained(site.candidate, settings=changed))

    return variants


# -- Hypotheses ------------------------------------------------------------------------

Hypotheses = Callable[[Site, Recipe], Iterator[tuple[str, Recipe]]]
"""What the change is called, and the recipe that the candidate may have followed in place of the agreed one."""


def _replayed(hypotheses: Hypotheses) -> Variants:
    """Repairs that put right − hypothesised on what the candidate's steps give."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, TrainingSite):
            return
        right = site.once(adamw.agreed)
        tried = [(words, _mistake(site, right, wrong)) for words, wrong in hypotheses(site, right)]
        nearest = sorted(((m[0], words, m[1]) for words, m in tried if m), key=lambda item: item[0])
        for _, words, mistake in nearest[:MOST]:
            step = adamw.undone(site, mistake)
            yield Variant(words, trained(site.candidate, step=step))

    return variants


def _mistake(site: TrainingSite, right: Recipe, wrong: Recipe) -> tuple[float, Mistake] | None:
    """Which share of the error a hypothesis leaves, and what would have to be undone; None if it leaves too much."""
    told = site.finding.tap == optimizer.LEARNING_RATE
    of_rates, of_updates = _rates_are(site, right, wrong), _updates_share(site, right, wrong)
    if not (of_rates if told else of_updates <= NEARER):
        return None
    return of_updates, Mistake(right, wrong, of_rates, of_updates <= NEARER)


def _rates_are(site: Site, right: Recipe, wrong: Recipe) -> bool:
    """The rates that the candidate tells are the hypothesised."""
    told = np.asarray(site.once(adamw.course).rates)
    highest = max(right.rates)
    error, left = (float(np.abs(told - np.asarray(recipe.rates)).max()) for recipe in (right, wrong))
    return error > EXACT * highest and left <= EXACT * highest


def _updates_share(site: TrainingSite, right: Recipe, wrong: Recipe) -> float:
    """Which share of a parameter's error a hypothesis leaves."""
    tap = site.finding.tap
    if tap == optimizer.LEARNING_RATE:
        tap = next(iter(site.once(adamw.course).params[0]))
    if tap not in site.once(adamw.course).params[0]:
        return float("inf")
    with np.errstate(all="ignore"):
        share = adamw.distance(site, wrong, tap) / (site.once(_errors)(tap) or 1.0)
    return share if np.isfinite(share) else float("inf")


def _errors(site: Site) -> Callable[[str], float]:
    """How far each parameter's updates are from the agreed ones."""
    known: dict[str, float] = {}

    def error(tap: str) -> float:
        if tap not in known:
            known[tap] = adamw.distance(site, site.once(adamw.agreed), tap)
        return known[tap]

    return error


# -- Rates -----------------------------------------------------------------------------


def _rates(words: str, rates: Callable[[Site], Iterator[schedule.Rates]]) -> Variants:
    def hypotheses(site: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
        for wrong in dict.fromkeys(rates(site)):
            yield words, replace(right, rates=wrong)

    return _replayed(hypotheses)


# -- Adam ------------------------------------------------------------------------------

BETAS1 = (0.0, 0.5, 0.8, 0.85, 0.95, 0.98, 0.99, 0.999)
BETAS2 = (0.9, 0.98, 0.99, 0.995, 0.999, 0.9999)
EPSILONS = (0.0, 1e-15, 1e-12, 1e-10, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def _betas(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    words = f"with beta1 {right.beta1}, beta2 {right.beta2}"
    for beta1 in (right.beta1, *BETAS1):
        for beta2 in (right.beta2, *BETAS2):
            if (beta1, beta2) not in ((right.beta1, right.beta2), (right.beta2, right.beta1)):
                yield words, replace(right, beta1=beta1, beta2=beta2)


def _exchanged(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    yield (
        f"with beta1 {right.beta1} for the first moment, beta2 {right.beta2} for the second",
        replace(right, beta1=right.beta2, beta2=right.beta1),
    )


def _epsilon(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    for epsilon in EPSILONS:
        yield f"with epsilon {right.epsilon} instead of {epsilon}", replace(right, epsilon=epsilon)


def _inside(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def direction(m: np.ndarray, v: np.ndarray, count: int, r: Recipe) -> np.ndarray:
        return m / (1 - r.beta1**count) / np.sqrt(v / (1 - r.beta2**count) + r.epsilon)

    for epsilon in (right.epsilon, 1e-6, 1e-5, 1e-16):
        yield "with epsilon added to the root", replace(right, direction=direction, epsilon=epsilon)


def _biased(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def direction(first: bool, second: bool) -> Any:
        def biased(m: np.ndarray, v: np.ndarray, count: int, r: Recipe) -> np.ndarray:
            left1, left2 = 1 - r.beta1**count * first, 1 - r.beta2**count * second
            return m / left1 / (np.sqrt(v / left2) + r.epsilon)

        return biased

    for first, second, words in (
        (False, False, "both moments"),
        (False, True, "the first"),
        (True, False, "the second"),
    ):
        yield f"with bias correction of {words}", replace(right, direction=direction(first, second))


def _rootless(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def direction(m: np.ndarray, v: np.ndarray, count: int, r: Recipe) -> np.ndarray:
        return m / (1 - r.beta1**count) / (v / (1 - r.beta2**count) + r.epsilon)

    def biased(m: np.ndarray, v: np.ndarray, count: int, r: Recipe) -> np.ndarray:
        return m / (1 - r.beta1**count) / (v + r.epsilon)

    for way in (direction, biased):
        yield "with the root of the second moment", replace(right, direction=way)


def _forgetful(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    # Betas of 0 in the average and as agreed in what it is divided by: the count goes on.
    def uncounted(m: np.ndarray, v: np.ndarray, count: int, r: Recipe) -> np.ndarray:
        del count
        return adamw.adam(m, v, 1, r)

    yield "with the moments of the step before", replace(right, forgets=True)
    yield "with the moments and the count of the step before", replace(right, forgets=True, direction=uncounted)


# -- Clipping --------------------------------------------------------------------------


def _clipped_otherwise(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def none(gradient: np.ndarray, norm: float, limit: float) -> np.ndarray:
        del norm, limit
        return gradient

    def alone(gradient: np.ndarray, norm: float, limit: float) -> np.ndarray:
        del norm
        return adamw.by_global_norm(gradient, float(np.linalg.norm(gradient)), limit)

    yield "with clipping by the global norm in place of none", replace(right, clip=none)
    yield "with clipping by the global norm in place of each parameter's", replace(right, clip=alone)


def _by_value(site: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def by_value(gradient: np.ndarray, norm: float, limit: float) -> np.ndarray:
        del norm
        return np.clip(gradient, -limit, limit)

    # A limit that hardly any step reaches is no clipping.
    steps = site.once(adamw.course).gradients
    largest = np.median([max(float(np.abs(g).max(initial=0.0)) for g in found.values()) for found in steps])
    shares = (right.clip_norm * share for share in (1.0, 0.1, 0.01, 0.001))
    for limit in (limit for limit in (*shares, 1.0, 0.5, 0.1, 0.01, 0.001) if limit < largest):
        yield (
            "with clipping by the global norm in place of each element",
            replace(right, clip=by_value, clip_norm=limit),
        )


def _clip_norm(site: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    limits = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, *(right.clip_norm * share for share in (0.1, 0.5, 2.0, 10.0)))
    # A limit beyond all norms is no clipping.
    for limit in (limit for limit in limits if limit < max(site.once(adamw.course).norms)):
        yield f"with clip norm {right.clip_norm:g} instead of {limit:g}", replace(right, clip_norm=limit)


# -- Weight decay ----------------------------------------------------------------------


def _everything_decays(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    yield "with the decay of norms and biases given back", replace(right, decays=lambda *_: True)


def _undecayed(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    def but_embeddings(name: str, parameter: np.ndarray) -> bool:
        return adamw.matrices(name, parameter) and not name.startswith("embed.")

    def but_ids(name: str, parameter: np.ndarray) -> bool:
        return but_embeddings(name, parameter) and not name.startswith("head.")

    yield "with decay applied after the step", replace(right, weight_decay=0.0)
    yield "with decay of the embeddings applied after the step", replace(right, decays=but_embeddings)
    yield "with decay of embeddings and head applied after the step", replace(right, decays=but_ids)


def _coupled(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    words = "with decay of the parameters instead of the gradients"
    for decays in (adamw.matrices, lambda *_: True):
        yield words, replace(right, coupled="after", decays=decays)
        yield words, replace(right, coupled="before", decays=decays)


def _unscheduled(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    count, highest = len(right.rates), max(right.rates)
    shares = tuple(rate / highest for rate in right.rates)
    for wrong in ((1.0,) * count, (highest,) * count, shares):
        yield "with decay multiplied by the learning rate of the step", replace(right, decay_rates=wrong)


def _last(_: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    yield "with decay of the parameters before the update", replace(right, decay_last=True)


def _other_decay(site: Site, right: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What the first step took of the embedding tells how much."""
    own, name = site.once(adamw.course), site.finding.tap
    start = own.params[0].get(name)
    if start is None or start.ndim < 2 or name not in own.params[1]:
        return
    wide, gradient = {name: start.astype(np.float64)}, {name: own.gradients[0][name].astype(np.float64)}
    update = adamw.Replay(replace(right, weight_decay=0.0)).updates(wide, gradient, own.norms[0])[name]
    taken = wide[name] + update - own.params[1][name]
    share = float((taken * wide[name]).sum() / np.square(wide[name]).sum()) / right.rates[0]
    if abs(share) > 1e-3 * right.weight_decay:
        yield f"with weight_decay {right.weight_decay} instead of {share:.3g}", replace(right, weight_decay=share)


# -- Storage ---------------------------------------------------------------------------


def _narrow_master(site: Site) -> Iterator[Variant]:
    if not isinstance(site, TrainingSite):
        return
    own, right = site.once(adamw.course), site.once(adamw.agreed)
    for dtype in adamw.ULPS:
        if all(adamw.is_stored_in(array, dtype) for params in own.params[1:] for array in params.values()):
            step = adamw.undone(site, Mistake(right, right, of_rates=False, stored=dtype))
            yield Variant(f"with what {dtype} lost", trained(site.candidate, step=step))
            return


# -- All of them -----------------------------------------------------------------------


def _either(*ways: Variants) -> Variants:
    return lambda site: chain.from_iterable(way(site) for way in ways)


_OPTIMIZER = "in jaxgpt/optimizer.py"
_STEP = "in jaxgpt/train_step.py"
_SETTINGS = "give both sides the same training settings: {}"


def _repair(cause: str, advice: str, variants: Variants) -> Repair:
    return Repair(cause, advice, RUNGS, variants)


_SCHEDULES = (
    ("learning rate decays to zero", "end the decay at the final learning rate", schedule.to_zero),
    ("linear instead of cosine decay", "the decay is half a cosine (schedule: cosine)", schedule.linear),
    ("constant learning rate", "let the rate decay after the warm-up", schedule.constant),
    ("warm-up missing", "the rate of step k of w warm-up steps is (k + 1) / (w + 1) of the highest", schedule.cold),
    ("schedule counted in micro-batches", "count optimizer steps, not micro-batches", schedule.in_micro_batches),
    (
        "learning-rate schedule off by one",
        "count steps from 0: step k of w warm-up steps must have (k + 1) / (w + 1) of the highest rate",
        schedule.off_by_one,
    ),
    ("wrong learning rate", "multiply the schedule with the highest learning rate once", schedule.scaled),
)

REPAIRS: tuple[Repair, ...] = (
    _repair(
        "betas exchanged", f"beta1 is of the first moment, beta2 of the second, {_OPTIMIZER}", _replayed(_exchanged)
    ),
    _repair(
        "wrong betas of AdamW", _SETTINGS.format("beta1, beta2"), _either(_setting("beta1", "beta2"), _replayed(_betas))
    ),
    _repair(
        "wrong learning-rate schedule",
        _SETTINGS.format("learning_rate, schedule, warmup_steps, steps, decay_fraction, final_learning_rate"),
        _setting("learning_rate", "schedule", "warmup_steps", "steps", "decay_fraction", "final_learning_rate"),
    ),
    *(
        _repair(cause, f"{advice}, {_OPTIMIZER}", _rates("with the agreed rate in every step", rates))
        for cause, advice, rates in _SCHEDULES
    ),
    _repair(
        "moments reset at each step",
        f"hand the optimizer's state of each step to the next, {_STEP}",
        _replayed(_forgetful),
    ),
    _repair("bias correction missing", f"divide each moment by 1 − βᵗ, {_OPTIMIZER}", _replayed(_biased)),
    _repair(
        "second moment without its root", f"divide by the root of the second moment, {_OPTIMIZER}", _replayed(_rootless)
    ),
    _repair("epsilon inside the root", f"add epsilon to the root, {_OPTIMIZER}", _replayed(_inside)),
    _repair("wrong epsilon of Adam", f"epsilon is 1e-8, {_OPTIMIZER}", _replayed(_epsilon)),
    _repair(
        "decay applied to norms and biases",
        f"decay matrices only: the mask of optax.adamw {_OPTIMIZER}",
        _replayed(_everything_decays),
    ),
    _repair(
        "weight decay missing",
        f"decay matrices by learning rate times weight_decay, {_OPTIMIZER}",
        _replayed(_undecayed),
    ),
    _repair(
        "decay not multiplied by the schedule",
        f"decay by the learning rate of the step times weight_decay, {_OPTIMIZER}",
        _replayed(_unscheduled),
    ),
    _repair(
        "coupled (L2) weight decay",
        f"decay the parameters, not the gradients: AdamW instead of Adam with L2, {_OPTIMIZER}",
        _replayed(_coupled),
    ),
    _repair("decay of the updated parameters", f"decay what the step began with, {_OPTIMIZER}", _replayed(_last)),
    _repair(
        "wrong weight decay",
        _SETTINGS.format("weight_decay"),
        _either(_setting("weight_decay"), _replayed(_other_decay)),
    ),
    _repair(
        "gradients not clipped by their global norm",
        f"clip by the norm of all gradients together, before AdamW, {_OPTIMIZER}",
        _replayed(_clipped_otherwise),
    ),
    _repair(
        "gradients clipped by value",
        f"clip by the norm of all gradients together, not each element, {_OPTIMIZER}",
        _replayed(_by_value),
    ),
    _repair("wrong clip norm", _SETTINGS.format("clip_norm"), _either(_setting("clip_norm"), _replayed(_clip_norm))),
    _repair(
        "master weights in low precision",
        f"keep the parameters that are trained in float32 and cast them for each forward, {_STEP}",
        _narrow_master,
    ),
)
"""Narrow ones first."""
