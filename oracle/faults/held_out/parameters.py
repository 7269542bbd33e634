"""Wrong parameters that nobody repairs."""

from collections.abc import Callable

import numpy as np

from jaxgpt.config import ModelConfig
from oracle.candidate import Candidate
from oracle.faults.fault import with_parameters

CHUNK = 8
"""Rows that are read or written at once."""


def column_zeroed(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """One output is dead."""
    spoilt = kernel.copy()
    spoilt[:, 7] = 0
    return spoilt


def rows_sorted(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Every row in ascending order."""
    return np.sort(kernel, axis=1)


def checkerboard(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Every other number has the wrong sign."""
    rows, columns = np.indices(kernel.shape)
    return np.where((rows + columns) % 2, -kernel, kernel)


def inner_shards_exchanged(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Four row-parallel shards joined in the order 0, 2, 1, 3."""
    shards = np.array_split(kernel, 4, axis=0)
    return np.concatenate([shards[rank] for rank in (0, 2, 1, 3)], axis=0)


def first_shard_twice(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Both column-parallel ranks loaded the shard of rank 0."""
    half = kernel.shape[1] // 2
    spoilt = kernel.copy()
    spoilt[:, half : 2 * half] = kernel[:, :half]
    return spoilt


def outliers_saturated(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """Clipped at two standard deviations, as for a quantiser, and never quantised."""
    return np.clip(kernel, -2 * kernel.std(), 2 * kernel.std())


def chunk_at_another_offset(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """The third chunk of rows was written where the fifth belongs, after it."""
    spoilt = kernel.copy()
    spoilt[4 * CHUNK : 5 * CHUNK] = kernel[2 * CHUNK : 3 * CHUNK][: len(kernel) - 4 * CHUNK]
    return spoilt


def pruned(config: ModelConfig, kernel: np.ndarray) -> np.ndarray:
    """The smallest third of the numbers set to zero."""
    return np.where(np.abs(kernel) < np.quantile(np.abs(kernel), 1 / 3), 0, kernel)


def averaged_over_layers(leaf: str) -> Callable[[Candidate], Candidate]:
    """A mean over checkpoints taken over layers instead: every layer holds the same."""

    def plant(candidate: Candidate) -> Candidate:
        names = [f"layers.{layer}.{leaf}" for layer in range(candidate.config.num_hidden_layers)]
        arrays = [np.asarray(candidate.stored[name]) for name in names]
        mean = np.mean([array.astype(np.float32) for array in arrays], axis=0).astype(arrays[0].dtype)
        return with_parameters(candidate, dict.fromkeys(names, mean))

    return plant
