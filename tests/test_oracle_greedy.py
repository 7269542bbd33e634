"""Greedy choices are judged by noise that is drawn again where a few lucky draws would decide."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from oracle import noise
from oracle.compare import Judge
from oracle.echo import ECHOES
from oracle.rungs import decode

TRUTH = np.array([[[0.0, 10.0, 7.0, -3.0]] * 3])
JUDGE = Judge(decode.NAME, "bfloat16", noise.Calibration(4.0, {"decode": {"bfloat16": {"head": [1.0, 1.0]}}}, {}))


@dataclass
class Draws:
    """A reference whose logits are off by `small` in the first draws and by `large` in one of those behind."""

    small: float
    large: float
    asked: list[int]

    @property
    def truth(self) -> Any:
        return SimpleNamespace(logits=lambda _: TRUTH)

    def logit_draws(self, ids: np.ndarray, numbers: Iterable[int]) -> list[np.ndarray]:
        numbers = list(numbers)
        self.asked.append(len(numbers))
        return [TRUTH + (self.large if number >= ECHOES else self.small) for number in (-1, *numbers)]


@pytest.mark.parametrize(
    ("chosen", "large", "asked", "wrong"),
    [
        (1, 5.0, [2], False),
        (2, 5.0, [2, 7], False),
        (2, 0.1, [2, 7], True),
    ],
    ids=["exact", "within the noise of further draws", "beyond it"],
)
def test_a_choice_is_wrong_only_beyond_every_draw(chosen: int, large: float, asked: list[int], wrong: bool):
    reference: Any = Draws(0.1, large, [])
    candidate: Any = SimpleNamespace(real_ids=None)
    choices = decode.judged(candidate, reference, JUDGE, 0, [0], [chosen, 1, 1])
    assert reference.asked == asked
    assert bool(choices.wrong) is wrong
