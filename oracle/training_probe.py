"""What training is compared on: documents, conversations, and how to optimize.

Documents are cut by rows, rows hold several documents, conversations have prompts of
unequal length and several turns, micro-batches have unequal numbers of trained
tokens and rows of padding; 20 steps hold warm-up, decay and steps that are clipped.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from jaxgpt.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=20,
    batch_size=2,
    accumulate=3,
    sequence_length=32,
    learning_rate=5e-4,
    schedule="cosine",
    warmup_steps=4,
    final_learning_rate=0.1,
    weight_decay=0.5,
    beta1=0.9,
    beta2=0.95,
    clip_norm=0.9,
)
"""What both sides are told. A small rate keeps rounding from growing chaotically in models whose weights are
unusually large, and strong decay shows beside rounding. The clip norm is in multiples of the first step's gradient
norm, so that some steps of any model are clipped and some are not."""

LARGE = 2_000_000
"""Parameters from which gradients are compared on one micro-batch, and the optimizer on a part of the model."""
PART_IDS = 512
"""Ids of that part."""

DOCUMENTS = (45, 5, 1, 31, 58, 6)
"""Tokens of each: with rows of 32, no document ends within two places of a row's edge."""
EPISODES = ((21, 0, 5), (26, 3, 17), (10, 0, 7), (29, 0, 22), (6, 0, 3), (19, 5, 12), (12, 0, 11), (23, 5, 13))
"""Tokens, where an earlier reply ends (0: there is none) and where the last reply begins."""


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Corpus:
    """Token lists to train on."""

    documents: tuple[Ids, ...]
    episodes: tuple[tuple[Ids, Ids], ...]
    """Ids, and 1 for each that is trained."""


def corpus(config: ModelConfig, real_ids: int, seed: int) -> Corpus:
    """Random ids; lengths shrink with the context where that is shorter than the rows."""
    rng = np.random.default_rng(seed)
    share = min(1.0, config.max_position_embeddings / SETTINGS.sequence_length)

    def scaled(length: int, least: int) -> int:
        return max(least, int(length * share))

    def ids(length: int) -> Ids:
        return tuple(rng.integers(0, real_ids, length).tolist())

    documents = tuple(ids(scaled(length, 1)) for length in DOCUMENTS)
    lengths = [(scaled(length, 2), scaled(ends, 0), scaled(begins, 1)) for length, ends, begins in EPISODES]
    return Corpus(documents, tuple((ids(length), _flags(length, ends, begins)) for length, ends, begins in lengths))


def _flags(length: int, ends: int, begins: int) -> Ids:
    """The earlier reply is two tokens long, the last one all that follows."""
    return tuple(int(max(1, ends - 2) <= place < ends or place >= begins) for place in range(length))


def settings_for(config: ModelConfig, settings: TrainSettings) -> TrainSettings:
    """Settings with rows that fit into the context."""
    T = min(settings.sequence_length, config.max_position_embeddings)
    return dataclasses.replace(settings, sequence_length=T)


def is_large(config: ModelConfig) -> bool:
    """The model is compared with less, so that time and memory suffice."""
    return sum(math.prod(parameter.shape) for parameter in weights.parameters(config)) > LARGE


def part_of(config: ModelConfig) -> ModelConfig:
    """The first layer, and the vocabulary's first ids: what of a large model is optimized."""
    return dataclasses.replace(config, num_hidden_layers=1, vocab_size=min(config.vocab_size, PART_IDS))


def without_dropout(config: ModelConfig) -> ModelConfig:
    """The same model with all rates 0."""
    return dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def with_dropout(config: ModelConfig, rate: float = 0.1) -> ModelConfig:
    """The same model with all rates above 0."""
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
