"""Repairs of training: of batches, losses, their accumulation, and steps.

The candidate's functions stay black boxes: what a repair changes is the corpus or the
batch that goes in, or the arrays that come out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from oracle import lesson, training_probe, training_reference
from oracle.repairs.repair import Repair, Variant
from oracle.repairs.training import accumulation, batches, losses, optimization
from oracle.repairs.training.corrections import NEARER
from oracle.rungs import gradients, loss, optimizer
from oracle.site import Site
from oracle.training_site import TrainingSite, trained

Arrays = dict[str, Any]

# -- What the losses are given ---------------------------------------------------------


def _of_functions(site: Site, change: str, on: Callable[[Arrays], Arrays]) -> Iterator[Variant]:
    """The same change of the batch for every function that gives a wrong loss."""
    if not isinstance(site, TrainingSite) or site.finding.tap.startswith(loss.BATCH) or site.rung == optimizer.NAME:
        return
    training = site.candidate.training
    position = {"losses": 2, "gradients": 4, "step": 4}
    wrapped = {name: _with_input(getattr(training, name), position[name], on) for name in site.wrong_functions()}
    if wrapped:
        yield Variant(change, trained(site.candidate, **wrapped))


def _with_input(function: Callable[..., Any], position: int, on: Callable[[Arrays], Arrays]) -> Callable[..., Any]:
    def repaired(*given: Any) -> Any:
        return function(*given[:position], on(dict(given[position])), *given[position + 1 :])

    return repaired


def _shifted(name: str, words: str, *by: int) -> Callable[[Site], Iterator[Variant]]:
    """One array of the batch moved along the row before the losses are given it."""

    def variants(site: Site) -> Iterator[Variant]:
        for places in by:
            change = f"with the {words} one place {'earlier' if places > 0 else 'later'}"
            moved = lambda batch, places=places: batch | {name: jnp.roll(batch[name], -places, -1)}  # noqa: E731
            yield from _of_functions(site, change, moved)

    return variants


def _dropout_off(site: Site) -> Iterator[Variant]:
    if not isinstance(site, TrainingSite) or site.finding.tap != loss.TOKENS:
        return
    function = site.candidate.training.losses

    def repaired(config: Any, *given: Any) -> Any:
        return function(training_probe.without_dropout(config), *given)

    yield Variant("with all dropout rates 0", trained(site.candidate, losses=repaired))


# -- Accumulation ----------------------------------------------------------------------


def _equal_shares(site: Site) -> Iterator[Variant]:
    """Every micro-batch gets all rows of the step, each counting for its share: equal numbers of trained tokens."""
    if isinstance(site, TrainingSite) and site.once(_tells_mean_of_means):
        change = "with all rows in every micro-batch, so that each has as many trained tokens"
        step = _with_input(site.candidate.training.step, 4, _shared)
        yield Variant(change, trained(site.candidate, step=step))


def _tells_mean_of_means(site: Site) -> bool:
    """The first step's loss is that mean: else a step that takes one micro-batch for all looks the same."""
    asked, course = lesson.part(site.comparison), lesson.course_of(site.comparison)
    group = lesson.groups(asked)[0]
    ((_, report),) = asked.steps([group], course.clip_norm, 1)
    large = training_probe.is_large(site.candidate.config)
    decoder = site.comparison.reference.truth.decoder
    decoder = training_reference.part_of(decoder, asked.candidate.config.vocab_size) if large else decoder
    means = [training_reference.gradients(decoder, [batch])[0] for batch in group]
    told, right = float(report.loss), course.truth[0].report.loss
    return abs(told - sum(means) / len(means)) <= NEARER * abs(told - right)


def _shared(batches: Arrays) -> Arrays:
    """(A, B, T) to (A, A·B, T), the mask divided by a power of two near A: sums of such numbers are exact."""
    count = next(iter(batches.values())).shape[0]

    def all_rows(array: Any) -> Any:
        rows = array.reshape(-1, array.shape[-1])
        return jnp.broadcast_to(rows, (count, *rows.shape))

    shared = {name: all_rows(array) for name, array in batches.items()}
    return shared | {"mask": shared["mask"] / 2 ** (count - 1).bit_length()}


# -- All of them -----------------------------------------------------------------------

_LOSSES = (loss.NAME, gradients.NAME)
_WHERE = "where the loss takes them (jaxgpt/loss.py)"

REPAIRS: tuple[Repair, ...] = (
    *batches.REPAIRS,
    Repair(
        "loss mask off by one",
        f"the mask belongs to the target: mask[t] says whether token t + 1 is trained, {_WHERE}",
        _LOSSES,
        _shifted("mask", "loss mask", 1, -1),
    ),
    Repair(
        "label shift missing",
        f"the target of place t is token t + 1, {_WHERE}",
        _LOSSES,
        _shifted("targets", "targets", 1),
    ),
    Repair(
        "label shift doubled",
        f"shift the targets once: not {_WHERE}",
        _LOSSES,
        _shifted("targets", "targets", -1),
    ),
    Repair(
        "dropout left on",
        "compute losses that are only looked at without dropout: no rng for jaxgpt.model.forward",
        (loss.NAME,),
        _dropout_off,
    ),
    *losses.REPAIRS,
    Repair(
        "gradient accumulation normalised per micro-batch",
        "divide the summed losses once, by the trained tokens of the whole step (jaxgpt/train_step.py)",
        (optimizer.NAME,),
        _equal_shares,
    ),
    *accumulation.REPAIRS,
    *optimization.REPAIRS,
)
"""Narrow ones first."""
