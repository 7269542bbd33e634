"""Sampling: strictly greedy at 0, transformers' filters, honest draws, one compilation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxgpt.sampling import Knobs, filtered, sample

sampled = jax.jit(sample)
kept = jax.jit(filtered)


def knobs(rows: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, seed: Any = 0) -> Knobs:
    return Knobs(
        jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), rows),
        jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), rows),
        jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), rows),
        jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), rows),
    )


def draw(logits: Any, *, sampleable: Any = None, position: Any = 0, **settings: Any) -> np.ndarray:
    logits = jnp.asarray(logits, jnp.float32)
    allowed = jnp.ones(logits.shape[-1], bool) if sampleable is None else jnp.asarray(sampleable)
    rows = logits.shape[0]
    positions = jnp.broadcast_to(jnp.asarray(position, jnp.int32), rows)
    return np.asarray(sampled(logits, allowed, knobs(rows, **settings), positions))


def random_logits(rows: int, size: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, size))).astype(np.float32)


# -- Greedy ----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 50),
    st.floats(1 / 1024, 1.0, width=32),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10_000),
)
def test_greedy_is_the_argmax_whatever_the_other_knobs_say(data: int, top_k: int, top_p: float, seed: int, at: int):
    logits = random_logits(2, 40, seed=data)
    for temperature in (0.0, -1.0):
        ids = draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=at)
        assert np.array_equal(ids, logits.argmax(-1))


def test_greedy_ties_go_to_the_first_id():
    assert draw([[0.0, 7.0, 7.0, 1.0]], temperature=0.0).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_a_padded_row_never_wins_even_with_the_highest_logit(temperature: float):
    logits = random_logits(200, 12)
    logits[:, 8:] = 1e9
    ids = draw(logits, sampleable=np.arange(12) < 8, temperature=temperature, seed=np.arange(200))
    assert ids.max() < 8
    assert temperature > 0 or np.array_equal(ids, logits[:, :8].argmax(-1))


def test_padded_rows_take_no_share_of_top_k_and_top_p():
    logits = np.array([[5.0, 4.0, 3.0, 9.0, 9.0]], np.float32)
    allowed = jnp.asarray([True, True, True, False, False])
    masked = jnp.where(allowed, logits, -jnp.inf)
    assert np.isfinite(kept(masked, knobs(1, top_k=2)))[0].tolist() == [True, True, False, False, False]
    assert np.isfinite(kept(masked, knobs(1, top_k=4)))[0].tolist() == [True, True, True, False, False]
    assert np.isfinite(kept(masked, knobs(1, top_p=0.9)))[0].tolist() == [True, True, False, False, False]


def test_one_greedy_row_stays_greedy_among_sampled_ones():
    logits = np.tile(random_logits(1, 50, scale=0.1), (64, 1))
    ids = draw(logits, temperature=np.arange(64) % 2, seed=np.arange(64))
    assert (ids[::2] == logits[0].argmax()).all()
    assert len(set(ids[1::2].tolist())) > 10


# -- Filters ---------------------------------------------------------------------------


def transformers_kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Which ids transformers keeps; its warpers are there only where their value does something."""
    scores, ids = torch.tensor(logits), torch.zeros((len(logits), 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return torch.isfinite(scores).numpy()


SETTINGS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.9), (0.5, 20, 0.8), (2.0, 1, 0.5), (1.0, 500, 0.3), (0.9, 3, 1e-6)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_the_kept_ids_are_those_of_transformers(temperature: float, top_k: int, top_p: float, scale: float):
    logits = random_logits(16, 300, scale)
    chosen = knobs(16, temperature, top_k, top_p)
    ours = np.asarray(kept(logits, chosen))
    theirs = transformers_kept(logits, temperature, top_k, top_p)
    # Where the sum at the cut is the target to the last bits, either rounding is right.
    assert not (disputed(logits, chosen, np.isfinite(ours) != theirs)).any()
    values = np.isfinite(ours) & theirs
    np.testing.assert_allclose(ours[values], (logits / np.float32(temperature))[values], rtol=3e-7)


def disputed(logits: np.ndarray, chosen: Knobs, different: np.ndarray) -> np.ndarray:
    """Differences that rounding cannot explain: the mass above the id is not within 1e-5 of top_p."""
    scaled = logits.astype(np.float64) / np.asarray(chosen.temperature, np.float64)[:, None]
    cut = np.sort(scaled, axis=-1)[:, ::-1][np.arange(len(scaled)), np.minimum(chosen.top_k, scaled.shape[1]) - 1]
    scaled = np.where((scaled >= cut[:, None]) | (np.asarray(chosen.top_k) == 0)[:, None], scaled, -np.inf)
    mass = np.exp(scaled - scaled.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    above = (mass[:, None, :] * (scaled[:, None, :] > scaled[:, :, None])).sum(-1)
    return different & (np.abs(above - np.asarray(chosen.top_p)[:, None]) > 1e-5)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1.0, 1.5, 2.0]), min_size=3, max_size=12), st.integers(1, 13))
def test_ties_at_the_kth_logit_are_kept_together_as_in_transformers(values: list[float], top_k: int):
    logits = np.array([values + [-9.0] * (13 - len(values))], np.float32)
    assert np.array_equal(np.isfinite(kept(logits, knobs(1, top_k=top_k))), transformers_kept(logits, 1.0, top_k, 1.0))


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=12), st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.95]))
def test_top_p_keeps_the_ids_of_transformers_and_their_ties(values: list[int], top_p: float):
    # transformers cuts ties by their place; here ids of one logit are kept or removed together.
    logits = np.array([[0.37 * value for value in values] + [-30.0] * (12 - len(values))], np.float32)
    theirs = transformers_kept(logits, 1.0, 0, top_p)
    ours = np.isfinite(kept(logits, knobs(1, top_p=top_p)))
    assert np.array_equal(ours, np.isin(logits, logits[theirs]))


def test_top_p_1_and_top_k_0_keep_every_id_however_unlikely():
    logits = np.concatenate([[60.0], np.linspace(-60, 0, 999)]).astype(np.float32)[None]
    assert np.isfinite(kept(logits, knobs(1))).all()
    assert np.isfinite(kept(np.roll(logits, 500), knobs(1, top_k=1000))).all()


def test_no_filter_ever_removes_the_most_likely_id():
    logits = random_logits(64, 100, 20.0)
    for top_k, top_p in ((1, 1.0), (0, 1e-7), (1, 1e-30), (100, 0.5)):
        ours = np.isfinite(kept(logits, knobs(64, 0.3, top_k, top_p)))
        assert ours[np.arange(64), logits.argmax(-1)].all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 2e-38, 1e-44])
def test_a_tiny_temperature_is_greedy_and_not_infinite(temperature: float):
    logits = random_logits(50, 30, 10.0)
    assert np.array_equal(draw(logits, temperature=temperature, seed=np.arange(50)), logits.argmax(-1))


def test_ids_of_one_logit_stay_equally_likely_at_a_tiny_temperature():
    ids = draw(np.tile([[7.0, 3.0, 7.0]], (4000, 1)), temperature=1e-6, seed=np.arange(4000))
    counts = np.bincount(ids, minlength=3)
    assert counts[1] == 0
    assert abs(counts[0] - 2000) < 5 * np.sqrt(1000)


def test_extreme_logits_stay_in_order():
    big = np.float32(3e38)
    logits = np.array([[-big, big, 0.0, 1e-37, -1e-37], [big, -big, big, 1.0, 2.0]], np.float32)
    assert np.isfinite(kept(logits, knobs(2, top_k=2)))[0].tolist() == [False, True, False, True, False]
    assert np.isfinite(kept(logits, knobs(2, top_k=1)))[1].tolist() == [True, False, True, False, False]
    assert draw(logits, temperature=1.0)[0] == 1


# -- Draws -----------------------------------------------------------------------------


def chi_square(ids: np.ndarray, probabilities: np.ndarray) -> float:
    expected = len(ids) * probabilities
    return float((np.square(np.bincount(ids, minlength=len(expected)) - expected) / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.7, 4)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, vary: str):
    count, logits = 20_000, np.array([2.0, -1.0, 0.5, 1.5, 0.0, 1.0], np.float32)
    varied: dict[str, Any] = {vary: np.arange(count)}
    ids = draw(np.tile(logits, (count, 1)), temperature=temperature, top_k=top_k, **varied)
    scaled = logits / temperature
    alive = np.argsort(-scaled)[: top_k or len(scaled)]
    probabilities = np.exp(scaled[alive]) / np.exp(scaled[alive]).sum()
    assert np.isin(ids, alive).all()
    place = np.argsort(np.argsort(-scaled))[ids]
    # The 0.9999 quantile of chi-square with 5 degrees of freedom is 25.7.
    assert chi_square(place, probabilities) < 25.7


def test_neighbouring_positions_draw_independently():
    count = 20_000
    ids = draw(np.zeros((count, 2), np.float32), position=np.arange(count), seed=3)
    same = (ids[1:] == ids[:-1]).mean()
    assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(count)


def test_a_draw_depends_on_its_seed_and_position_and_on_no_neighbour():
    logits = random_logits(1, 1000, 0.5)[0]
    alone = draw([logits], seed=5, position=17)[0]
    for rows in (2, 7, 8):
        batch = random_logits(rows, 1000, seed=rows)
        batch[rows - 1] = logits
        ids = draw(batch, seed=[*range(100, 99 + rows), 5], position=[*range(1, rows), 17])
        assert ids[rows - 1] == alone
    assert len({int(draw([logits], seed=seed, position=17)[0]) for seed in range(20)}) > 10
    assert len({int(draw([logits], seed=5, position=position)[0]) for position in range(20)}) > 10


def test_the_largest_seed_is_a_seed_of_its_own():
    logits = np.zeros((1, 1000), np.float32)
    assert len({int(draw(logits, seed=seed)[0]) for seed in (0, 1, 2**31, 2**32 - 1)}) == 4


def test_a_vocabulary_of_152k_is_filtered_exactly():
    logits = random_logits(2, 151_936, 2.0)
    order = np.sort(logits, axis=-1)
    for top_k in (1, 50, 100_000):
        ours = np.isfinite(kept(logits, knobs(2, top_k=top_k)))
        assert np.array_equal(ours, logits >= order[:, -top_k][:, None])
    ours = np.isfinite(kept(logits, knobs(2, top_p=0.9)))
    mass = np.exp(logits.astype(np.float64))
    mass /= mass.sum(-1, keepdims=True)
    assert (mass * ours).sum(-1) == pytest.approx(0.9, abs=1e-4)
    assert ours.sum(-1).max() < 151_936
    assert draw(logits, temperature=0.0).tolist() == logits.argmax(-1).tolist()


def test_changing_a_knob_compiles_nothing():
    function = jax.jit(lambda *arguments: sample(*arguments))
    logits, allowed = jnp.asarray(random_logits(3, 20)), jnp.ones(20, bool)
    for values in [(0.0, 0, 1.0, 0), (1.0, 0, 1.0, 1), (0.7, 40, 1.0, 2), (0.1, 3, 0.5, 2**32 - 1), (-1.0, 7, 0.1, 9)]:
        function(logits, allowed, knobs(3, *values), jnp.arange(3))
    assert function._cache_size() == 1
