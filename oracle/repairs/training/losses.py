"""Repairs of the loss: what a program may have computed of the right logits, instead of −log p(target) in nats."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from oracle import lesson, training_reference
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.training import corrections
from oracle.repairs.training.corrections import NEARER, Change
from oracle.rungs import gradients, loss
from oracle.site import Site
from oracle.training_site import TrainingSite, trained
from torchref.training import Batch

TokenLosses = Callable[[Tensor, Batch], Tensor]
"""(B, T, V) logits and a batch to (B, T) losses, or (B, T − 1)."""
RUNGS = (loss.NAME, gradients.NAME)


def nats(logits: Tensor, batch: Batch) -> Tensor:
    """What is right."""
    return -torch.log_softmax(logits, -1).gather(-1, batch.targets[..., None])[..., 0]


# -- One micro-batch -------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """The candidate's losses of the first micro-batch, and the reference's logits of it."""

    losses: np.ndarray
    logits: Tensor
    batch: Batch

    @property
    def trained(self) -> np.ndarray:
        """Where losses matter."""
        return self.batch.mask.numpy() > 0

    def of(self, function: TokenLosses) -> np.ndarray:
        return function(self.logits, self.batch).numpy()

    def is_nearer_to(self, wrong: np.ndarray) -> bool:
        """The losses are the hypothesised rather than the right ones."""
        if self.losses.shape != wrong.shape:
            return False
        T = wrong.shape[1]
        error, left = (
            np.linalg.norm((self.losses - other[:, :T])[self.trained[:, :T]]) for other in (self.of(nats), wrong)
        )
        return bool(left <= NEARER * error)

    def share_of(self, added: TokenLosses) -> float:
        """How much of `added` the losses have beside the right ones: least squares."""
        if self.losses.shape != self.batch.mask.shape:
            return 0.0
        surplus, unit = ((array)[self.trained] for array in (self.losses - self.of(nats), self.of(added)))
        return float(surplus @ unit) / (float(unit @ unit) or 1.0)


def _answer(site: Site) -> _Answer:
    batch = site.once(corrections.batches)[0]
    return _Answer(lesson.whole(site.comparison).token_losses(batch), _logits(site, batch), batch)


def _logits(site: Site, batch: Batch) -> Tensor:
    with torch.no_grad():
        return site.comparison.reference.truth.decoder(
            batch.ids, positions=batch.positions, segments=batch.segments
        ).double()


# -- Hypotheses ------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """A wrong loss of every token, and the mean that comes of it."""

    change: str
    wrong: TokenLosses
    means: tuple[Callable[[Tensor, Batch, int], Tensor], ...] = ()
    """What a micro-batch adds to the mean, given the trained tokens of the step, where it is not Σ mask · loss / N."""

    def shares(self, site: Site) -> Iterator[corrections.Answer]:
        """The mean loss and the gradient that come of it."""
        N = sum(batch.trained for batch in site.once(corrections.batches))
        for mean in self.means or (self._mean,):
            parts = corrections.differentiated(site, lambda logits, batch, mean=mean: mean(logits, batch, N))
            yield corrections.summed(parts, [1.0] * len(parts))

    def _mean(self, logits: Tensor, batch: Batch, trained: int) -> Tensor:
        return (self.wrong(logits, batch) * batch.mask).sum() / trained


def _replayed(hypotheses: Callable[[TrainingSite], Iterator[Hypothesis]]) -> Callable[[Site], Iterator[Variant]]:
    """Repairs that put right − hypothesised on what the candidate answers."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, TrainingSite) or not corrections.is_of_losses(site):
            return
        for hypothesis in hypotheses(site):
            changes = _of_tokens(site, hypothesis) | _of_means(site, hypothesis)
            if changes:
                yield Variant(hypothesis.change, trained(site.candidate, **changes))

    return variants


def _of_tokens(site: TrainingSite, hypothesis: Hypothesis) -> dict[str, Any]:
    answer = site.once(_answer)
    if "losses" not in site.wrong_functions() or not answer.is_nearer_to(answer.of(hypothesis.wrong)):
        return {}
    function = site.candidate.training.losses

    def repaired(config: Any, params: Any, batch: Any, dtype: str) -> Any:
        given = training_reference.received(batch)
        logits = _logits(site, given)
        left = np.asarray(function(config, params, batch, dtype)) - hypothesis.wrong(logits, given).numpy()
        lacking = given.ids.shape[1] - left.shape[1]
        return jnp.asarray(nats(logits, given).numpy() + np.pad(left, ((0, 0), (0, lacking))), jnp.float32)

    return {"losses": repaired}


def _of_means(site: TrainingSite, hypothesis: Hypothesis) -> dict[str, Any]:
    if "gradients" not in site.wrong_functions():
        return {}
    for wrong in hypothesis.shares(site):
        change = corrections.moved(site, wrong)
        if change is not None:
            return corrections.answering(site, change)
    return {}


# -- Something added -------------------------------------------------------------------


def _uniform(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy with the uniform distribution, less that with the target."""
    return -torch.log_softmax(logits, -1).mean(-1) - nats(logits, batch)


def _squared(logits: Tensor, _: Batch) -> Tensor:
    """log Z squared."""
    return torch.logsumexp(logits, -1).square()


def _added(words: str, unit: TokenLosses, usual: tuple[float, ...]) -> Callable[[TrainingSite], Iterator[Hypothesis]]:
    """A share of `unit` beside the loss: what the tokens say, or else the usual ones."""

    def hypotheses(site: TrainingSite) -> Iterator[Hypothesis]:
        told = "losses" in site.wrong_functions()
        for share in (site.once(_answer).share_of(unit),) if told else usual:
            yield Hypothesis(words.format(share), partial(_with, unit, share))

    return hypotheses


def _with(unit: TokenLosses, share: float, logits: Tensor, batch: Batch) -> Tensor:
    return nats(logits, batch) + share * unit(logits, batch)


# -- Shifts ----------------------------------------------------------------------------


def _shift_again(_: Site) -> Iterator[Hypothesis]:
    """Logits of place t with the target of place t + 1, in rows one shorter, or filled up with 0 at either end."""

    def short(logits: Tensor, batch: Batch) -> Tensor:
        return -torch.log_softmax(logits[:, :-1], -1).gather(-1, batch.targets[:, 1:, None])[..., 0]

    def filled(at: tuple[int, int], logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.pad(short(logits, batch), at)

    def turned(logits: Tensor, batch: Batch) -> Tensor:
        return -torch.log_softmax(logits, -1).gather(-1, batch.targets.roll(-1, 1)[..., None])[..., 0]

    def mean(wrong: TokenLosses, of: slice, all_count: bool, logits: Tensor, batch: Batch, trained: int) -> Tensor:
        mask = batch.mask[:, of]
        return (wrong(logits, batch) * mask).sum() / (trained if all_count else max(1, int(mask.sum())))

    own, later = slice(None, -1), slice(1, None)
    means = tuple(partial(mean, short, of, all_count) for of in (later, own) for all_count in (True, False))
    change = "with the targets as the batch has them"
    yield Hypothesis(change, short, means)
    yield Hypothesis(change, partial(filled, (0, 1)), means)
    yield Hypothesis(change, partial(filled, (1, 0)), means)
    yield Hypothesis(change, turned)


def _no_shift(_: Site) -> Iterator[Hypothesis]:
    """Logits of place t with token t."""
    yield Hypothesis(
        "with the targets of the batch in place of its ids",
        lambda logits, batch: -torch.log_softmax(logits, -1).gather(-1, batch.ids[..., None])[..., 0],
    )


# -- Units -----------------------------------------------------------------------------


def _divided(factor: float) -> Callable[[Site], Iterator[Variant]]:
    """All losses, their mean and its gradient so many times too large."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, TrainingSite) or not corrections.is_of_losses(site):
            return
        answer, training, changes = site.once(_answer), site.candidate.training, {}
        if "losses" in site.wrong_functions() and answer.is_nearer_to(factor * answer.of(nats)):
            changes["losses"] = lambda *given: training.losses(*given) / factor
        change: Change | None = None
        if "gradients" in site.wrong_functions():
            change = corrections.divided(site, factor)
        if change is not None:
            changes |= corrections.answering(site, change)
        if changes:
            yield Variant(f"divided by {factor:.6g}", trained(site.candidate, **changes))

    return variants


# -- Precision -------------------------------------------------------------------------

EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half an ulp at 1."""


def _narrow(site: Site) -> Iterator[Variant]:
    """Losses that all are numbers of a narrow dtype and differ from the right ones by its rounding only."""
    if not isinstance(site, TrainingSite) or not corrections.is_of_losses(site):
        return
    answer, changes = site.once(_answer), {}
    for dtype in EPSILON:
        if "losses" in site.wrong_functions() and _is_rounding(answer.losses, answer.logits, answer.batch, dtype):
            changes["losses"] = _widened(site, dtype)
        if "gradients" in site.wrong_functions() and _mean_is_narrow(site, dtype):
            changes |= corrections.answering(site, _unrounded(site, dtype))
        if changes:
            yield Variant(f"with what {dtype} lost", trained(site.candidate, **changes))
            return


def _is_rounding(losses: np.ndarray, logits: Tensor, batch: Batch, dtype: str) -> bool:
    """Also of the logits alone, before a loss in float32."""
    if losses.shape != batch.mask.shape:
        return False
    where, true = batch.mask.numpy() > 0, nats(logits, batch).numpy()
    rounded = nats(logits.to(getattr(torch, dtype)).double(), batch).numpy()
    if np.linalg.norm((losses - rounded)[where]) <= 0.1 * np.linalg.norm((losses - true)[where]):
        return True
    sizes = logits.abs().amax(-1).numpy() + true + math.log(logits.shape[-1])
    is_on_grid = np.asarray(losses, np.float32) == np.asarray(jnp.asarray(losses, dtype), np.float32)
    return bool((is_on_grid & (np.abs(losses - true) <= 2 * EPSILON[dtype] * sizes))[where].all())


def _widened(site: TrainingSite, dtype: str) -> Any:
    function = site.candidate.training.losses

    def repaired(config: Any, params: Any, batch: Any, compute: str) -> Any:
        losses, given = np.asarray(function(config, params, batch, compute)), training_reference.received(batch)
        logits = _logits(site, given)
        if not _is_rounding(losses, logits, given, dtype):
            return losses
        return jnp.asarray(np.where(given.mask.numpy() > 0, nats(logits, given).numpy(), losses), jnp.float32)

    return repaired


def _mean_is_narrow(site: TrainingSite, dtype: str) -> bool:
    """A mean and a gradient that are wrong by rounding only; where the tokens are right the mean must be narrow too."""
    mine, true = site.once(corrections.observed), site.once(corrections.right)
    limit = 8 * EPSILON[dtype]
    is_on_grid = mine.loss == float(jnp.asarray(mine.loss, dtype))
    near = abs(mine.loss - true.loss) <= limit * true.loss
    size = corrections.distance({}, true.gradients)
    close = near and corrections.distance(mine.gradients, true.gradients) <= limit * size
    return close and (is_on_grid or "losses" in site.wrong_functions())


def _unrounded(site: Site, dtype: str) -> Change:
    mine, true = site.once(corrections.observed), site.once(corrections.right)
    by = true.loss - mine.loss
    moves = {n: np.asarray(true.gradients[n] - mine.gradients[n], np.float32) for n in true.gradients}
    is_float32 = site.candidate.dtype == "float32"
    return lambda value, found: (value + by, {n: g + moves[n] for n, g in found.items()} if is_float32 else found)


# -- All of them -----------------------------------------------------------------------

_WHERE = "where the loss of a token is computed (jaxgpt/loss.py)"
Z_LOSS = (1e-4, 1e-3, 1e-2, 1e-5)
SMOOTHING = (0.1, 0.05, 0.2, 0.01)

REPAIRS: tuple[Repair, ...] = (
    Repair("loss in bits", f"natural logarithm: do not divide by ln 2, {_WHERE}", RUNGS, _divided(1 / math.log(2))),
    Repair(
        "label smoothing",
        f"cross entropy with the target alone, {_WHERE}",
        RUNGS,
        _replayed(_added("without label smoothing of {:.3g}", _uniform, SMOOTHING)),
    ),
    Repair(
        "z-loss added",
        f"leave the auxiliary loss (log Z)² away, {_WHERE} or where the mean is taken",
        RUNGS,
        _replayed(_added("without {:.3g} · (log Z)²", _squared, Z_LOSS)),
    ),
    Repair(
        "loss computed in low precision",
        f"take the logits to float32 before the softmax, {_WHERE}",
        RUNGS,
        _narrow,
    ),
    Repair(
        "label shift doubled",
        f"the batch's targets are shifted already: no shift {_WHERE}",
        RUNGS,
        _replayed(_shift_again),
    ),
    Repair("label shift missing", f"take the batch's targets, not its ids, {_WHERE}", RUNGS, _replayed(_no_shift)),
)
"""Narrow ones first."""
