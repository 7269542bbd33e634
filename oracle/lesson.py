"""One lesson for both sides: what the training rungs put to the candidate, and the reference's answers to it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt import train_step
from jaxgpt.data.batches import Batch
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import training_probe, training_reference
from oracle.candidate import Candidate, unrunnable
from oracle.comparison import Comparison
from oracle.echo import ALL, ECHOES, FURTHER, echoes
from oracle.reference import Reference
from oracle.training_probe import Corpus
from oracle.training_reference import Arrays, State
from torchref import Decoder, training

Grouped = Sequence[Sequence[training.Batch]]


@dataclass(frozen=True)
class Lesson:
    """A candidate, and what it is asked."""

    candidate: Candidate
    corpus: Corpus
    settings: TrainSettings
    """The reference's: what was agreed on."""

    @property
    def own_settings(self) -> TrainSettings:
        """The candidate's, with rows that fit its context."""
        return training_probe.settings_for(self.candidate.config, self.candidate.training.settings)

    @property
    def master(self) -> dict[str, Any]:
        """The parameters in float32, rounded to the compute dtype as the reference's are."""
        return {name: jnp.asarray(array, jnp.float32) for name, array in self.candidate.params.items()}

    def own_batches(self) -> Sequence[Batch]:
        """The candidate's micro-batches."""
        with unrunnable("packing"):
            return self.candidate.training.batches(self.corpus, self.own_settings)

    def token_losses(self, batch: training.Batch) -> np.ndarray:
        """The candidate's, dropout off although the config has rates: that is the losses' own business."""
        config = training_probe.with_dropout(self.candidate.config)
        arrays = {name: jnp.asarray(array) for name, array in as_product(batch).items()}
        with unrunnable("loss"):
            return np.asarray(self.candidate.training.losses(config, self.master, arrays, self.candidate.dtype))

    def gradients(self, batches: Sequence[training.Batch]) -> tuple[float, dict[str, np.ndarray]]:
        """The candidate's mean loss over micro-batches and its gradient; training has dropout, so the rates are 0."""
        config = training_probe.without_dropout(self.candidate.config)
        state = TrainState(self.master, (), jnp.int32(0), _key(self.own_settings))
        given = config, self.own_settings, self.candidate.dtype, state, _stacked(batches)
        with unrunnable("gradient"):
            loss, gradients = self.candidate.training.gradients(*given)
            return float(loss), {name: np.asarray(array) for name, array in gradients.items()}

    def steps(self, groups: Grouped, clip_norm: float, count: int) -> Iterator[tuple[Arrays, StepReport]]:
        """The candidate's parameters after each step, in float32; `clip_norm` is the unit of the settings' own."""
        config = training_probe.without_dropout(self.candidate.config)
        settings = scaled(self.own_settings, clip_norm)
        stacks = [_stacked(group) for group in groups]
        with unrunnable("training step"):
            state = train_step.initial_state(self.master, settings)
        for number in range(count):
            with unrunnable("training step"):
                given = config, settings, "float32", state, stacks[number % len(stacks)]
                state, report = self.candidate.training.step(*given)
                # The next step uses up the state's buffers.
                params = {name: np.array(array) for name, array in state.params.items()}
            yield params, report


def scaled(settings: TrainSettings, clip_norm: float) -> TrainSettings:
    """Settings whose clip norm is in multiples of `clip_norm`."""
    return dataclasses.replace(settings, clip_norm=settings.clip_norm * clip_norm)


def _key(settings: TrainSettings) -> Any:
    return jax.random.key_data(jax.random.key(settings.seed))


def as_product(batch: training.Batch) -> dict[str, np.ndarray]:
    """A batch of the reference in the product's dtypes."""
    arrays: Any = training_reference.as_product(batch)
    return arrays


def _stacked(batches: Sequence[training.Batch]) -> Any:
    return train_step.stacked([training_reference.as_product(batch) for batch in batches])


# -- The lesson of a comparison --------------------------------------------------------


def whole(comparison: Comparison) -> Lesson:
    """The model as it is."""
    return _lesson(comparison.candidate, comparison.real_ids, comparison.seed)


def part(comparison: Comparison) -> Lesson:
    """The first layer and first ids of a large model; a small one as it is."""
    if not training_probe.is_large(comparison.candidate.config):
        return whole(comparison)
    config = training_probe.part_of(comparison.candidate.config)
    ids = config.vocab_size
    stored = {
        name: array[:ids] if name in ("embed.tokens.weight", "head.weight") else array
        for name, array in comparison.candidate.stored.items()
        if not name.startswith("layers.") or name.startswith("layers.0.")
    }
    candidate = dataclasses.replace(comparison.candidate, config=config, stored=stored)
    return _lesson(candidate, min(comparison.real_ids, ids), comparison.seed)


def _lesson(candidate: Candidate, real_ids: int, seed: int) -> Lesson:
    corpus = training_probe.corpus(candidate.config, real_ids, seed + 2)
    return Lesson(candidate, corpus, training_probe.settings_for(candidate.config, training_probe.SETTINGS))


# -- The reference's answers -----------------------------------------------------------


def micro_batches(lesson: Lesson) -> list[training.Batch]:
    """The reference's."""
    return training_reference.micro_batches(lesson.corpus, lesson.settings)


def groups(lesson: Lesson) -> Grouped:
    """Its micro-batches, as many as belong to a step at a time."""
    batches, size = micro_batches(lesson), lesson.settings.accumulate
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def gradient_batches(lesson: Lesson) -> list[training.Batch]:
    """The micro-batches of one gradient: all of them; of a large model the last, which holds episodes and padding."""
    batches = micro_batches(lesson)
    return batches[-1:] if training_probe.is_large(lesson.candidate.config) else batches


Losses = Sequence[np.ndarray]
"""Truth's, the peer's and, where they are cheap, its echoes' losses of a micro-batch, (B, T) each."""


@lru_cache(maxsize=1)
def gradients(
    reference: Reference, corpus: Corpus, settings: TrainSettings
) -> tuple[tuple[float, Arrays], tuple[float, Arrays]]:
    """Truth's and peer's mean loss and gradient over all micro-batches of a small model."""
    batches = training_reference.micro_batches(corpus, settings)
    truth, peer = (training_reference.gradients(model.decoder, batches) for model in (reference.truth, reference.peer))
    return truth, peer


def losses_of(comparison: Comparison) -> list[Losses]:
    """Of each of `gradient_batches(whole(comparison))`."""
    asked = whole(comparison)
    large = training_probe.is_large(asked.candidate.config)
    return _losses(comparison.reference, asked.corpus, asked.settings, large=large)


@lru_cache(maxsize=1)
def _losses(reference: Reference, corpus: Corpus, settings: TrainSettings, *, large: bool) -> list[Losses]:
    batches = training_reference.micro_batches(corpus, settings)
    truth, peer = reference.truth.decoder, reference.peer.decoder

    def of(batch: training.Batch) -> Losses:
        own = [training_reference.token_losses(decoder, batch) for decoder in (truth, peer)]
        moved = () if large else echoes(peer, ALL)  # each is one for as long as it is looked at
        return [*own, *(training_reference.token_losses(decoder, batch) for decoder in moved)]

    return [of(batch) for batch in (batches[-1:] if large else batches)]


@lru_cache(maxsize=1)
def echoed_gradients(reference: Reference, corpus: Corpus, settings: TrainSettings) -> list[Arrays]:
    """Further draws of the noise in the peer's gradient of a small model."""
    batches = training_reference.micro_batches(corpus, settings)
    return [training_reference.gradients(decoder, batches)[1] for decoder in echoes(reference.peer.decoder, ALL)]


COMPARED = (1, 2, 4, 8, 20)
"""Steps after which parameters are compared: one shows the update, two the moments, all the schedule."""
ByStep = Mapping[int, Arrays]
"""Parameters after each of those steps."""


@dataclass(frozen=True)
class Course:
    """The reference's steps."""

    clip_norm: float
    """About the first step's gradient norm: the unit of the settings' clip norm."""
    start: Arrays
    truth: Sequence[State]
    """Arrays of compared steps only: of a large model all would fill the memory."""
    draws: Sequence[ByStep]
    """The peer's parameters and, of a small model, its echoes'."""
    draw: Callable[[Iterable[int]], list[ByStep]]
    """Makes those of the echoes of some numbers."""

    @cached_property
    def further(self) -> list[ByStep]:
        """More draws of the noise, where those at hand leave a doubt."""
        return self.draw(FURTHER)

    @property
    def clipped(self) -> int:
        """Steps whose gradient was longer than the clip norm."""
        limit = self.clip_norm * training_probe.SETTINGS.clip_norm
        return sum(state.report.grad_norm >= limit for state in self.truth)


@lru_cache(maxsize=1)
def course(reference: Reference, ids: int, corpus: Corpus, settings: TrainSettings) -> Course:
    """Truth's steps and the peer's, its in float32; `ids` is 0 for the whole model, else the part's vocabulary."""
    batches = training_reference.micro_batches(corpus, settings)
    size = settings.accumulate
    grouped = [batches[start : start + size] for start in range(0, len(batches), size)]
    truth, peer = (_model(model.decoder, ids) for model in (reference.truth, reference.peer))
    _, first = training.gradients(truth, grouped[0])
    norm = _on_grid(training.global_norm(first))

    def steps(model: Decoder, dtype: torch.dtype) -> Iterator[State]:
        trainer = training_reference.trainer(model, scaled(settings, norm), dtype)
        return training_reference.steps(trainer, grouped, settings.steps, COMPARED)

    def compared(model: Decoder) -> ByStep:
        states = enumerate(steps(model, torch.float32), 1)
        return {number: state.parameters for number, state in states if number in COMPARED}

    def draw(numbers: Iterable[int]) -> list[ByStep]:
        return [compared(model) for model in echoes(peer, numbers)]

    start = training_reference.named(dict(truth.named_parameters()))
    true = list(steps(truth, torch.float64))
    draws = [compared(peer), *draw(() if ids else range(ECHOES))]
    return Course(norm, start, true, draws, draw)


def forget() -> None:
    """Drop the reference's answers: those of a large model fill a quarter of the memory."""
    for answers in (gradients, _losses, echoed_gradients, course):
        answers.cache_clear()


def _on_grid(norm: float) -> float:
    """The nearest power of √2: settings are compiled in, and models of one kind should share a compilation."""
    return 2 ** (round(2 * math.log2(norm)) / 2) if norm else 1.0


def course_of(comparison: Comparison) -> Course:
    """The reference's steps that belong to `part(comparison)`."""
    asked = part(comparison)
    return course(comparison.reference, _ids_of_part(comparison), asked.corpus, asked.settings)


def part_of_truth(comparison: Comparison) -> Decoder:
    """The reference's model in float64 that belongs to `part(comparison)`."""
    return _model(comparison.reference.truth.decoder, _ids_of_part(comparison))


def _ids_of_part(comparison: Comparison) -> int:
    config = comparison.candidate.config
    return training_probe.part_of(config).vocab_size if training_probe.is_large(config) else 0


def _model(decoder: Decoder, ids: int) -> Decoder:
    return training_reference.part_of(decoder, ids) if ids else decoder
