"""An interpolated bigram model: what a language model must clearly beat to have learned anything."""

from collections.abc import Iterable

import numpy as np

from jaxgpt.data.batches import Batch


class InterpolatedBigram:
    """p(b | a) = m(a)·c(ab)/c(a) + (1 - m(a))·p(b), Witten-Bell smoothed (Chen & Goodman 1998, section 2.4).

    How much the pair counts weigh depends on how many different tokens followed a:
    m(a) = c(a) / (c(a) + distinct(a)). The unigram is interpolated with the uniform
    distribution in the same way.
    """

    def __init__(self, vocab_size: int):
        self.pairs = np.zeros((vocab_size, vocab_size), np.int64)

    def count(self, batches: Iterable[Batch]) -> None:
        """Count every trained (token, next token) pair of the batches."""
        for batch in batches:
            trained = batch["mask"] > 0
            np.add.at(self.pairs, (batch["ids"][trained], batch["targets"][trained]), 1)

    def loss(self, batches: Iterable[Batch]) -> float:
        """Mean -log p in nats over the trained targets of the batches."""
        size = len(self.pairs)
        follows = self.pairs.sum(axis=0)
        unigram = _interpolated(follows, np.full(size, 1 / size))
        total, count = 0.0, 0
        rows: dict[int, np.ndarray] = {}
        for batch in batches:
            trained = batch["mask"] > 0
            for a, b in zip(batch["ids"][trained].tolist(), batch["targets"][trained].tolist(), strict=True):
                if a not in rows:
                    rows[a] = _interpolated(self.pairs[a], unigram)
                total -= float(np.log(rows[a][b]))
                count += 1
        return total / count


def _interpolated(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    seen = counts.sum()
    if not seen:
        return lower
    weight = seen / (seen + np.count_nonzero(counts))
    return weight * counts / seen + (1 - weight) * lower
