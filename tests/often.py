"""Which cases of a long table `make test` runs; the others are for `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

FAMILIES = ("gpt2", "llama-biased-tied", "mistral", "qwen3-yarn")
"""Of conftest's configs: learned positions and rotated ones, scaled or not; both norms, both MLPs; with and without
biases, tying, norms of heads and a window. For tests that compare jaxgpt with itself."""


def exhaustive_but(often: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases for `parametrize`, those that are not `often` marked exhaustive."""
    return [pytest.param(case, marks=() if case in often else pytest.mark.exhaustive) for case in cases]
