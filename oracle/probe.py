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
"""Up to this many positions a second row, and decoding to the context's edge, are affordable."""
STEPS = 12
"""Cached decode steps that are compared tap by tap in a small model; a large one takes a quarter."""


@dataclass(frozen=True)
class Probe:
    """One batch of whole sequences, (B, T) each."""

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    """Documents 1, 2, …; 0 is padding."""


@dataclass(frozen=True)
class DecodeProbe:
    """Prompts of unequal length and what is forced after them."""

    prompts: Sequence[Sequence[int]]
    forced: np.ndarray
    """(steps, B): the ids that both sides are fed after the prefill."""
    new_tokens: Sequence[int]
    """Greedy tokens of each prompt."""
    reaches_edge: bool
    """The longest row ends at the last position of the context."""


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


def decoding(config: ModelConfig, real_ids: int, seed: int = 1) -> DecodeProbe:
    """Three prompts, the longest of which a small model decodes to the last position."""
    limit = config.max_position_embeddings
    small = limit <= SMALL
    steps = min(STEPS if small else STEPS // 4, max(1, limit // 4))
    longest = limit - steps if small else 64
    lengths = [min(5, longest), longest, max(1, longest // 3)]
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, real_ids, length).tolist() for length in lengths]
    forced = rng.integers(0, real_ids, (steps, len(prompts)), dtype=np.int32)
    greedy = 64 if small else 32
    return DecodeProbe(prompts, forced, [min(greedy, limit - length) for length in lengths], reaches_edge=small)
