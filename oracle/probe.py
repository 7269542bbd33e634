"""Inputs that give faults a chance to show: long, packed, padded and ragged.

What a comparison can find is decided by its inputs. Positions go past 512 where the
context allows, documents are packed into one row with positions that restart, and
decoding starts from prompts of unequal length and runs to the context's edge where
that is affordable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxgpt.config import ModelConfig

LONG = 528
"""Positions of the long row: beyond 512."""
SMALL = 256
"""Up to this many positions a second row is affordable."""
CHEAP = 1 << 18
"""Layers times width times context of a model that is affordable to decode to the context's edge."""
STEPS = 12
"""Cached decode steps that are compared tap by tap in a small model; a large one takes a quarter."""
EDGE = 64
"""The cache's first bucket: the next token makes it grow."""
MANY, FEW = 32, 3
"""Prompts that a small, and a large, model continues greedily."""


@dataclass(frozen=True)
class Probe:
    """One batch of whole sequences, (B, T) each."""

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    """Documents 1, 2, …; 0 is padding."""


@dataclass(frozen=True)
class Forced:
    """Prompts of unequal length and the ids that both sides are fed after the prefill."""

    prompts: Sequence[Sequence[int]]
    ids: np.ndarray
    """(steps, B)"""
    label: str = ""
    """What these prompts are there for, where there are several probes."""


@dataclass(frozen=True)
class DecodeProbe:
    """What cached decoding is tried on."""

    forced: Sequence[Forced]
    prompts: Sequence[Sequence[int]]
    """To be continued greedily."""
    new_tokens: Sequence[int]
    """How many tokens for each of `prompts`."""
    reaches_edge: bool
    """Forced and greedy tokens go on to the last position of the context."""


def sequences(config: ModelConfig, real_ids: int, seed: int = 0) -> Probe:
    """Row 0 one long document; then (in the same row, if rows are expensive) short ones and padding."""
    width = min(config.max_position_embeddings, LONG)
    documents = [[width], [width // 2, width // 5, 1]] if width <= SMALL else [[width - 12, 8]]
    ids = np.random.default_rng(seed).integers(0, real_ids, (len(documents), width), dtype=np.int32)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return Probe(ids, positions, segments)


def is_cheap(config: ModelConfig) -> bool:
    """Decoding goes to the last position of the context."""
    return config.num_hidden_layers * config.hidden_size * config.max_position_embeddings <= CHEAP


def decoding(config: ModelConfig, real_ids: int, seed: int = 1) -> DecodeProbe:
    """Ragged prompts; in a small model forced over a bucket edge and to the context's last position."""
    limit = config.max_position_embeddings
    small = is_cheap(config)
    rng = np.random.default_rng(seed)
    steps = min(STEPS if small else STEPS // 4, max(1, limit // 4))
    forced = [_forced(rng, real_ids, limit - steps if small else 64, steps)]
    if small and limit >= EDGE + 2:
        forced.append(_forced(rng, real_ids, EDGE - 2, 4, "bucket edge"))
    count = MANY if small else FEW
    lengths = [1 + (7 * row) % max(1, limit // 2) for row in range(count)]
    prompts = [rng.integers(0, real_ids, length).tolist() for length in lengths]
    greedy = limit if small else 32
    return DecodeProbe(forced, prompts, [min(greedy, limit - length) for length in lengths], reaches_edge=small)


def _forced(rng: np.random.Generator, real_ids: int, longest: int, steps: int, label: str = "") -> Forced:
    lengths = [min(5, longest), longest, max(1, longest // 3)]
    prompts = [rng.integers(0, real_ids, length).tolist() for length in lengths]
    return Forced(prompts, rng.integers(0, real_ids, (steps, len(prompts)), dtype=np.int32), label)
