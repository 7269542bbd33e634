"""Whether encoded text looks like text: counts, entropy, share of unknown tokens."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

MAX_UNKNOWN = 0.01
MIN_ENTROPY = 2.0
"""Bits; English and code have 6 to 10 with a BPE vocabulary, 4 to 5 with characters."""
ENOUGH_TOKENS = 10_000
"""Below this many tokens a low entropy may be chance."""


@dataclass(frozen=True)
class Statistics:
    """What the ids of some documents look like."""

    tokens: int
    documents: int
    distinct: int
    """Different ids that occur."""
    entropy: float
    """Of the distribution of single ids, in bits."""
    uniform_entropy: float
    """log2 of the vocabulary's size: the most `entropy` can be."""
    unknown: float
    """Share of ids that stand for text the vocabulary lacks (for `char`: byte tokens)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, {self.documents:,} documents, {self.distinct:,} distinct ids, "
            f"entropy {self.entropy:.2f} of {self.uniform_entropy:.2f} bits, unknown {self.unknown:.2%}"
        )


def measure(counts: np.ndarray, documents: int, unknown_ids: np.ndarray) -> Statistics:
    """Statistics of ids counted in `counts` (V,), V the ids that mean something."""
    tokens = int(counts.sum())
    shares = counts[counts > 0] / max(tokens, 1)
    entropy = abs(float(-(shares * np.log2(shares)).sum()))
    return Statistics(
        tokens=tokens,
        documents=documents,
        distinct=len(shares),
        entropy=round(entropy, 6),
        uniform_entropy=round(math.log2(len(counts)), 6),
        unknown=round(int(counts[unknown_ids].sum()) / max(tokens, 1), 6),
    )


def judge(
    statistics: Statistics, what: str, *, unknown_cause: str = "", accept: bool = False, flag: str = "--accept"
) -> None:
    """Refuse ids that look broken; `what` names them in the message, `unknown_cause` is the tokenizer's.

    A vocabulary read in the wrong format gives almost only unknown tokens and an
    entropy near zero, and a model trained on it looks healthy: its loss is low.

    Raises:
        InputError: unknown above 1 %, or entropy below 2 bits on over 10,000
            tokens, with the likely cause and the command's `flag`; never if `accept`.
    """
    if accept:
        return
    if statistics.unknown > MAX_UNKNOWN:
        found = (
            f"{statistics.unknown:.2%} of {statistics.tokens:,} tokens are unknown, expected at most {MAX_UNKNOWN:.0%}"
        )
        cause = unknown_cause or "the vocabulary was made for other text"
    elif statistics.entropy < MIN_ENTROPY and statistics.tokens > ENOUGH_TOKENS:
        found = (
            f"entropy is {statistics.entropy:.3f} bits over {statistics.tokens:,} tokens "
            f"({statistics.distinct:,} distinct of {2**statistics.uniform_entropy:,.0f}), "
            f"expected at least {MIN_ENTROPY:g}"
        )
        cause = "the text repeats itself or the tokenizer does not split it"
    else:
        return
    raise InputError(f"{what}: {found}; likely cause: {cause}; pass {flag} to go on anyway")


def unknown_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that stand for text the vocabulary lacks.

    `char` spells it with its byte tokens, ids 0 to 255; byte-level BPE lacks none,
    unless it has no token for some byte.
    """
    return np.asarray(tokenizer.unknown_ids, np.int64)
