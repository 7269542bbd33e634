"""Sampling: strictly greedy at 0, transformers' filters, honest draws, one compilation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxgpt import sampling
from jaxgpt.sampling import History, Knobs, sample

sampled = jax.jit(sample)
penalised = jax.jit(sampling.penalised)

DTYPES = {
    **{"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "min_p": jnp.float32},
    **{"repetition_penalty": jnp.float32, "no_repeat_ngram_size": jnp.int32, "seed": jnp.uint32, "logprobs": bool},
}
OFF = {
    **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "seed": 0, "logprobs": False},
}


def knobs(rows: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, **others: Any) -> Knobs:
    given = {**OFF, "temperature": temperature, "top_k": top_k, "top_p": top_p, **others}
    return Knobs(**{name: jnp.broadcast_to(jnp.asarray(given[name], dtype), rows) for name, dtype in DTYPES.items()})


def history(rows: Any, lengths: Any = None) -> History:
    """Ids by position; a length alone says nothing about the ids before it."""
    ids = jnp.asarray(rows, jnp.int32)
    return History(
        ids, jnp.broadcast_to(jnp.asarray(ids.shape[1] if lengths is None else lengths, jnp.int32), len(ids))
    )


def draw(logits: Any, *, sampleable: Any = None, position: Any = 0, said: Any = None, **settings: Any) -> np.ndarray:
    logits = jnp.asarray(logits, jnp.float32)
    allowed = jnp.ones(logits.shape[-1], bool) if sampleable is None else jnp.asarray(sampleable)
    rows = logits.shape[0]
    before = history(np.zeros((rows, 1)) if said is None else said, position if said is None else None)
    return np.asarray(sampled(logits, allowed, knobs(rows, **settings), before))


@jax.jit
def kept(logits: jax.Array, chosen: Knobs) -> jax.Array:
    """Which ids may be drawn: what `sample` asks of the one it drew, asked of each."""
    keys = sampling._ordered_bits(logits)
    in_k = keys >= sampling.top_k_threshold(logits, keys, chosen.top_k)[:, None]
    mass = jnp.where(in_k, sampling.relative_mass(logits, chosen.temperature), 0.0)
    reach = jnp.where(chosen.top_p < 1, chosen.top_p * mass.sum(-1), jnp.inf)
    each = jnp.arange(logits.shape[1])
    in_p = jax.lax.map(
        lambda id: sampling.within_top_p(keys, mass, reach, jnp.full(len(logits), id)), each, batch_size=64
    )
    return in_k & in_p.T & (mass >= chosen.min_p[:, None]) & jnp.isfinite(logits)


def may_draw(logits: Any, chosen: Knobs) -> np.ndarray:
    values = jnp.asarray(logits, jnp.float32)
    return np.asarray(kept(jnp.pad(values, ((0, 0), (0, -values.shape[1] % 32)), constant_values=-jnp.inf), chosen))[
        :, : values.shape[1]
    ]


def random_logits(rows: int, size: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, size))).astype(np.float32)


# -- Greedy ----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 50),
    st.floats(1 / 1024, 1.0, width=32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 0.8, 1.3, 100.0]),
    st.integers(0, 3),
)
def test_greedy_is_the_argmax_whatever_the_other_knobs_say(
    data: int, top_k: int, top_p: float, seed: int, penalty: float, ngram: int
):
    logits = random_logits(2, 40, seed=data)
    given: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": top_p, "seed": seed, "logprobs": True}
    best = logits.argmax(-1)
    said = np.stack([best, best, np.zeros(2), best], axis=1)
    for temperature in (0.0, -1.0):
        ids = draw(
            logits,
            temperature=temperature,
            said=said,
            repetition_penalty=penalty,
            no_repeat_ngram_size=ngram,
            **given,
        )
        assert np.array_equal(ids, best)


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
    assert may_draw(masked, knobs(1, top_k=2))[0].tolist() == [True, True, False, False, False]
    assert may_draw(masked, knobs(1, top_k=4))[0].tolist() == [True, True, True, False, False]
    assert may_draw(masked, knobs(1, top_p=0.9))[0].tolist() == [True, True, False, False, False]
    assert may_draw(masked, knobs(1, min_p=0.3))[0].tolist() == [True, True, False, False, False]


def test_one_greedy_row_stays_greedy_among_sampled_ones():
    logits = np.tile(random_logits(1, 50, scale=0.1), (64, 1))
    ids = draw(logits, temperature=np.arange(64) % 2, seed=np.arange(64))
    assert (ids[::2] == logits[0].argmax()).all()
    assert len(set(ids[1::2].tolist())) > 10


# -- Filters ---------------------------------------------------------------------------


def transformers_kept(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Which ids transformers keeps; its warpers are there only where their value does something."""
    scores, ids = torch.tensor(logits), torch.zeros((len(logits), 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return torch.isfinite(scores).numpy()


SETTINGS = [
    *[(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.5, 20, 0.8, 0.0), (2.0, 1, 0.5, 0.0)],
    *[(1.0, 500, 0.3, 0.0), (0.9, 3, 1e-6, 0.0), (1.0, 0, 1.0, 0.1), (1.7, 40, 0.95, 0.03), (1.0, 0, 0.99, 1.0)],
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_the_ids_that_may_be_drawn_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, scale: float
):
    logits = random_logits(16, 300, scale)
    chosen = knobs(16, temperature, top_k, top_p, min_p=min_p)
    different = may_draw(logits, chosen) != transformers_kept(logits, temperature, top_k, top_p, min_p)
    # Where the sum at the cut is the target to the last bits, either rounding is right.
    assert not (disputed(logits, chosen, different)).any()


def disputed(logits: np.ndarray, chosen: Knobs, different: np.ndarray) -> np.ndarray:
    """Differences that rounding cannot explain: the mass above the id, or its own, is not within 1e-5 of the cut."""
    scaled = logits.astype(np.float64) / np.asarray(chosen.temperature, np.float64)[:, None]
    cut = np.sort(scaled, axis=-1)[:, ::-1][np.arange(len(scaled)), np.minimum(chosen.top_k, scaled.shape[1]) - 1]
    scaled = np.where((scaled >= cut[:, None]) | (np.asarray(chosen.top_k) == 0)[:, None], scaled, -np.inf)
    mass = np.exp(scaled - scaled.max(-1, keepdims=True))
    at_min_p = np.abs(mass - np.asarray(chosen.min_p, np.float64)[:, None]) < 1e-5 * np.asarray(chosen.min_p)[:, None]
    mass /= mass.sum(-1, keepdims=True)
    above = (mass[:, None, :] * (scaled[:, None, :] > scaled[:, :, None])).sum(-1)
    return different & (np.abs(above - np.asarray(chosen.top_p)[:, None]) > 1e-5) & ~at_min_p


@settings(deadline=None)
@given(st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1.0, 1.5, 2.0]), min_size=3, max_size=12), st.integers(1, 13))
def test_ties_at_the_kth_logit_are_kept_together_as_in_transformers(values: list[float], top_k: int):
    logits = np.array([values + [-9.0] * (13 - len(values))], np.float32)
    assert np.array_equal(may_draw(logits, knobs(1, top_k=top_k)), transformers_kept(logits, 1.0, top_k))


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=12), st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.95]))
def test_top_p_keeps_the_ids_of_transformers_and_their_ties(values: list[int], top_p: float):
    # transformers cuts ties by their place; here ids of one logit are kept or removed together.
    logits = np.array([[0.37 * value for value in values] + [-30.0] * (12 - len(values))], np.float32)
    theirs = transformers_kept(logits, 1.0, 0, top_p)
    ours = may_draw(logits, knobs(1, top_p=top_p))
    assert np.array_equal(ours, np.isin(logits, logits[theirs]))


def test_top_p_1_and_top_k_0_keep_every_id_however_unlikely():
    logits = np.concatenate([[60.0], np.linspace(-60, 0, 999)]).astype(np.float32)[None]
    assert may_draw(logits, knobs(1)).all()
    assert may_draw(np.roll(logits, 500), knobs(1, top_k=1000)).all()


def test_no_filter_ever_removes_the_most_likely_id():
    logits = random_logits(64, 100, 20.0)
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (0, 1e-7, 1.0), (1, 1e-30, 1.0), (100, 0.5, 0.5), (0, 1e-45, 0.0)):
        chosen: dict[str, Any] = {"temperature": 0.3, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        assert may_draw(logits, knobs(64, **chosen))[np.arange(64), logits.argmax(-1)].all()
        assert draw(logits, seed=np.arange(64), **chosen).max() < 100


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.01, 0.0), (7, 0.5, 0.0), (60, 1.0, 0.2), (1, 0.9, 0.1)])
def test_only_ids_that_may_be_drawn_are(top_k: int, top_p: float, min_p: float):
    logits = random_logits(2000, 75, 1.0)
    given: dict[str, Any] = {"temperature": 1.5, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    ids = draw(logits, seed=np.arange(2000), **given)
    assert may_draw(logits, knobs(2000, **given))[np.arange(2000), ids].all()


# -- What was said before --------------------------------------------------------------


def transformers_penalised(logits: np.ndarray, rows: list[list[int]], penalty: float, ngram: int) -> np.ndarray:
    """Row by row: transformers has no ragged rows without padding, which it would penalise."""
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram:
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    scores = [processors(torch.tensor([ids]), torch.tensor(row)[None]) for ids, row in zip(rows, logits, strict=True)]  # type: ignore[arg-type]
    return torch.cat(scores).numpy()


@pytest.mark.parametrize("far_too_long", [1000, 10**6])
def test_penalties_and_bans_of_ragged_rows_are_those_of_transformers(far_too_long: int):
    rng = np.random.default_rng(0)
    count, longest = 160, 16
    rows = [rng.integers(0, 2 + row % 6, rng.integers(1, longest + 1)).tolist() for row in range(count)]
    penalties = rng.choice([0.5, 1.0, 1.2, 3.0], count).tolist()
    ngrams = rng.choice([0, 1, 2, 2, 3, 4, 17, far_too_long], count).tolist()
    logits = random_logits(count, 9)
    # Beyond a row's end lie other ids and its own, as a forgotten reply leaves them.
    said = np.stack([np.resize([*ids, 7, 8], longest) for ids in rows])
    chosen = knobs(count, repetition_penalty=penalties, no_repeat_ngram_size=ngrams)
    ours = np.asarray(penalised(logits, chosen, history(said, [len(ids) for ids in rows])))
    theirs = [
        transformers_penalised(logits[row : row + 1], [ids], penalties[row], ngrams[row])[0]
        for row, ids in enumerate(rows)
    ]
    np.testing.assert_allclose(ours, np.stack(theirs), rtol=2e-7)
    assert sum(np.isinf(row).any() for row in theirs) > 40, "bans are compared, not their absence"


def test_a_row_whose_every_id_would_be_banned_is_drawn_from_as_if_none_were():
    logits = random_logits(1, 4)
    logits[0, 3] = 50.0
    given: dict[str, Any] = {"sampleable": np.arange(4) < 3, "no_repeat_ngram_size": 1, "seed": 1}
    assert draw(logits, said=[[0, 2]], **given)[0] == 1
    assert draw(logits, said=[[0, 2, 1]], top_k=1, **given)[0] == logits[0, :3].argmax()


def test_a_penalty_counts_before_temperature_and_filters_as_in_transformers():
    logits = np.array([[4.0, 3.9, -1.0, 0.0]], np.float32)
    assert draw(logits, said=[[0]], top_k=1)[0] == 0
    assert draw(logits, said=[[0]], top_k=1, repetition_penalty=1.1)[0] == 1
    assert draw(logits, said=[[0]], top_k=1, no_repeat_ngram_size=1)[0] == 1


# -- Log-probabilities -------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_alone_and_off_they_are_0():
    logits = random_logits(5, 151, 10.0)
    ids = np.array([0, 3, 150, 7, 7])
    expected = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()[np.arange(5), ids]
    wanted = knobs(5, temperature=0.1, top_k=1, repetition_penalty=2.0, logprobs=[True] + [False] * 4)
    ours = sampling.logprobs(jnp.asarray(logits), jnp.asarray(ids), wanted)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-5)
    assert not np.asarray(sampling.logprobs(jnp.asarray(logits), jnp.asarray(ids), knobs(5))).any()


# -- Extremes ----------------------------------------------------------------------------


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
    assert may_draw(logits, knobs(2, top_k=2))[0].tolist() == [False, True, False, True, False]
    assert may_draw(logits, knobs(2, top_k=1))[1].tolist() == [True, False, True, False, False]
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
    for rows in (2, 7):
        batch = random_logits(rows, 1000, seed=rows)
        batch[rows - 1] = logits
        ids = draw(batch, seed=[*range(100, 99 + rows), 5], position=[*range(1, rows), 17])
        assert ids[rows - 1] == alone
    assert len({int(draw([logits], seed=seed, position=17)[0]) for seed in range(20)}) > 10
    assert len({int(draw([logits], seed=5, position=position)[0]) for position in range(20)}) > 10


def test_the_largest_seed_is_a_seed_of_its_own():
    logits = np.zeros((1, 1000), np.float32)
    assert len({int(draw(logits, seed=seed)[0]) for seed in (0, 1, 2**31, 2**32 - 1)}) == 4


def test_the_kth_of_152k_logits_is_found_exactly_ties_included():
    logits = random_logits(2, 151_936, 2.0)
    logits[1] = np.round(logits[1])  # some thousand ids a value
    keys = sampling._ordered_bits(jnp.asarray(logits))
    threshold = jax.jit(sampling.top_k_threshold)
    for k in (1, 50, sampling.SEARCHED, sampling.SEARCHED + 1, 100_000):
        found = np.asarray(keys) >= np.asarray(threshold(logits, keys, jnp.full(2, k)))[:, None]
        assert np.array_equal(found, logits >= np.sort(logits, axis=-1)[:, -k][:, None])
    mixed = np.asarray(threshold(logits, keys, jnp.array([0, 3])))
    assert mixed[0] == 0
    assert (np.asarray(keys)[1] >= mixed[1]).sum() == (logits[1] >= np.sort(logits[1])[-3]).sum()


def test_draws_from_152k_ids_follow_the_distribution_and_stay_in_the_nucleus():
    rows, size = 16, 151_936
    logits = np.full((rows, size), -30.0, np.float32)
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    places = [7, 151_935, 4_748, 90_001, 31]
    logits[:, places] = np.log(probabilities)
    drawn = [draw(logits, seed=np.arange(rows), position=at, top_p=0.8, temperature=1.0) for at in range(12)]
    counts = [int((np.stack(drawn) == place).sum()) for place in places]
    # 0.4 + 0.3 is not yet 0.8; with 0.15 it is: three ids are left.
    assert sum(counts[:3]) == rows * 12
    expected = rows * 12 * probabilities[:3] / probabilities[:3].sum()
    # The 0.9999 quantile of chi-square with 2 degrees of freedom is 18.4.
    assert (np.square(counts[:3] - expected) / expected).sum() < 18.4
    assert draw(logits, temperature=0.0).tolist() == [7] * rows


def test_nothing_sorts_the_vocabulary():
    vocabulary = 151_936
    logits, allowed = jnp.zeros((2, vocabulary)), jnp.ones(vocabulary, bool)
    program = str(sampled.trace(logits, allowed, knobs(2, top_k=50, top_p=0.9), history(np.zeros((2, 64)))).jaxpr)
    assert " sort" not in program
    ordered = re.findall(r"= top_k\[.*?\] (\w+)", program, re.DOTALL)
    sizes = [int(re.search(rf"\b{name}:f32\[2,(\d+)\]", program)[1]) for name in ordered]
    assert sizes == [vocabulary // sampling.COLUMN], "the largest of each column, and nothing else"


def test_changing_a_knob_compiles_nothing():
    function = jax.jit(lambda *arguments: sample(*arguments))
    logits, allowed = jnp.asarray(random_logits(3, 20)), jnp.ones(20, bool)
    before = history(np.zeros((3, 5)), [1, 3, 5])
    for temperature, top_k, top_p, min_p, penalty, ngram, seed in [
        (0.0, 0, 1.0, 0.0, 1.0, 0, 0),
        (1.0, 0, 1.0, 0.1, 1.0, 2, 1),
        (0.7, 40, 1.0, 0.0, 1.2, 0, 2),
        (0.1, 3, 0.5, 1.0, 0.9, 7, 2**32 - 1),
        (-1.0, 7, 0.1, 0.5, 1.1, 1, 9),
    ]:
        others = {"min_p": min_p, "repetition_penalty": penalty, "no_repeat_ngram_size": ngram, "seed": seed}
        function(logits, allowed, knobs(3, temperature, top_k, top_p, **others), before)
    assert function._cache_size() == 1
