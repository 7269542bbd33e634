import numpy as np
import pytest

from jaxgpt.data.batches import Batch, empty_batch
from jaxgpt.evaluate.bigram import InterpolatedBigram


def batch(ids: list[int]) -> Batch:
    made = empty_batch(1, len(ids) - 1)
    made["ids"][0], made["targets"][0], made["mask"][0] = ids[:-1], ids[1:], 1.0
    return made


def test_a_bigram_model_is_a_distribution_and_learns_what_it_counts():
    model = InterpolatedBigram(4)
    assert model.loss([batch([0, 1, 2])]) == pytest.approx(np.log(4)), "nothing seen is a uniform guess"
    model.count([batch([0, 1, 0, 1, 0, 1, 2])])
    each = [np.exp(-model.loss([batch([0, b])])) for b in range(4)]
    assert sum(each) == pytest.approx(1.0)
    assert each[1] > each[2] > each[3] > 0


def test_masked_targets_are_neither_counted_nor_scored():
    hidden = batch([0, 3, 0])
    hidden["mask"][0, 0] = 0.0
    model = InterpolatedBigram(4)
    model.count([hidden])
    assert model.pairs.sum() == 1
    assert model.pairs[3, 0] == 1
