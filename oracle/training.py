"""How the candidate trains: every function that a fault can be planted in, or a repair can change.

By default they are the product's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from jaxgpt import loss, model, train_step
from jaxgpt.chat import Rendered
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch, EpisodeBatches, PretrainBatches
from jaxgpt.loss import Arrays
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle.training_probe import SETTINGS, Corpus

Packer = Callable[[Corpus, TrainSettings], Sequence[Batch]]
"""Documents and episodes to micro-batches: those of the documents, then those of the episodes."""
Losses = Callable[[ModelConfig, model.Params, Arrays, str], jax.Array]
"""Per-token losses (B, T) of one micro-batch, dropout off whatever the config's rates: config, float32
parameters, batch, compute dtype."""
Gradients = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""Signature of `jaxgpt.train_step.mean_gradients`; batches are arrays (A, B, T)."""
Step = Callable[..., tuple[TrainState, StepReport]]
"""Signature of `jaxgpt.train_step.train_step`. It may use up the state that it is given."""


@dataclass(frozen=True)
class _Stream:
    """What the product's packer reads of `jaxgpt.data.shards.TokenShards`, in memory."""

    lists: Sequence[Sequence[int]]

    @cached_property
    def stream(self) -> np.ndarray:
        return np.concatenate([np.asarray(ids, np.int32) for ids in self.lists])

    @property
    def tokens(self) -> int:
        return len(self.stream)

    @property
    def documents(self) -> int:
        return len(self.lists)

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.lists)])[:-1]

    @property
    def fingerprint(self) -> str:
        return ""

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.stream[start:stop]


def batches(corpus: Corpus, settings: TrainSettings) -> list[Batch]:
    """The product's micro-batches of the documents, then of the episodes, one epoch each."""
    stream: Any = _Stream(corpus.documents)
    episodes = [Rendered(list(ids), list(flags)) for ids, flags in corpus.episodes]
    given = settings.batch_size, settings.sequence_length, settings.seed
    sources = PretrainBatches(stream, *given), EpisodeBatches(episodes, *given)
    return [source.next() for source in sources for _ in range(source.total_batches)]


@partial(jax.jit, static_argnames=("config", "dtype", "forward"))
def losses(
    config: ModelConfig, params: model.Params, batch: Arrays, dtype: str, forward: model.ForwardPass = model.forward
) -> jax.Array:
    """The product's per-token losses."""
    cast = model.cast(params, dtype)
    output = forward(config, cast, batch["ids"], positions=batch["positions"], segments=batch["segments"])
    return loss.token_losses(output.logits, batch["targets"])


gradients: Gradients = jax.jit(train_step.mean_gradients, static_argnames=("config", "settings", "dtype", "forward"))
"""The product's, compiled as its training step compiles it."""


@dataclass(frozen=True)
class Training:
    """How a candidate trains."""

    settings: TrainSettings = SETTINGS
    batches: Packer = batches
    losses: Losses = losses
    gradients: Gradients = gradients
    step: Step = train_step.train_step

    def differentiating(self, forward: model.ForwardPass) -> "Training":
        """The product's own functions with another forward pass; what was changed already stays as it is."""
        own: dict[str, Any] = {"losses": losses, "gradients": gradients, "step": train_step.train_step}
        mine = {name: function for name, function in own.items() if getattr(self, name) is function}
        return replace(self, **{name: partial(function, forward=forward) for name, function in mine.items()})
