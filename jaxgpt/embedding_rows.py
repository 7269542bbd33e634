"""New rows of a vocabulary: an embedding, and a head of its own, with room for more tokens.

As `resize_token_embeddings(mean_resizing=True)` of transformers, after Hewitt,
"Initializing new word embeddings for pretrained language models" (2021): a new row is
the mean of the rows there are, so its logit is the mean of theirs and never the
highest, and what is likely among the others stays as it was. transformers draws its
noise from the rows' covariance times 1e-9, which bfloat16 rounds away; here it is a
hundredth of each column's spread, so that no two new tokens are the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError

NOISE = 0.01
"""Of the standard deviation of a column."""
_BLOCK = 1 << 14
"""Rows that are float64 at a time."""


def grown(
    params: Mapping[str, np.ndarray],
    config: ModelConfig,
    rows: int,
    *,
    real: Sequence[int],
    fresh: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The parameters with `rows` rows in the embedding, and in the head where the model does not tie them.

    Args:
        params: by the names of `weights.parameters(config)`; they are not changed.
        config: of `params`; that of the result differs in vocab_size.
        rows: at least config.vocab_size.
        real: ids that mean something, whose rows make the mean; padding is none of them.
        fresh: ids below config.vocab_size whose rows meant nothing, and are made anew.
        seed: of the noise.

    Raises:
        InputError: fewer rows than there are, or no real one.
    """
    if rows < config.vocab_size or not real:
        raise InputError(f"an embedding of {config.vocab_size} rows, {len(real)} of them real, cannot have {rows}")
    found = dict(params)
    random = np.random.default_rng(seed)
    for name in ("embed.tokens.weight", "head.weight"):
        if name in params:
            found[name] = _with_rows(params[name], rows, real, fresh, random)
    return found


def _with_rows(
    weight: np.ndarray, rows: int, real: Sequence[int], fresh: Sequence[int], random: np.random.Generator
) -> np.ndarray:
    """(V, D) as (rows, D)."""
    mean, spread = _moments(weight, real)
    new = [*fresh, *range(len(weight), rows)]
    whole = np.empty((rows, weight.shape[1]), weight.dtype)
    whole[: len(weight)] = weight
    whole[new] = (mean + NOISE * spread * random.standard_normal((len(new), len(mean)))).astype(weight.dtype)
    return whole


def _moments(weight: np.ndarray, real: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over some rows."""
    blocks = [real[begin : begin + _BLOCK] for begin in range(0, len(real), _BLOCK)]
    mean = squares = np.zeros(weight.shape[1])
    for block in blocks:
        mean = mean + weight[block].astype(np.float64).sum(0) / len(real)
    for block in blocks:
        squares = squares + np.square(weight[block].astype(np.float64) - mean).sum(0)
    return mean, np.sqrt(squares / len(real))
