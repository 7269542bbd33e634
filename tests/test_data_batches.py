import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.chat import TEMPLATES, Rendered
from jaxgpt.data.batches import (
    Batch,
    Batches,
    DataEnded,
    EpisodeBatches,
    PretrainBatches,
    Validation,
    permutation,
    validation,
)
from jaxgpt.data.encode import encode
from jaxgpt.data.shards import TokenShards
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

TEXTS = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(3 + (i * 37) % 90)) for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    (path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=TEXTS)
    encode([path / "x.jsonl"], path / "out", tokenizer, shard_tokens=700, val_fraction=0.2)
    return path / "out"


@pytest.fixture
def shards(folder: Path) -> TokenShards:
    return TokenShards(folder)


def random_episodes(count: int, longest: int, seed: int = 0) -> list[Rendered]:
    """Every id is unique, so that a target tells where it came from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    edges = np.cumsum([1, *lengths])
    ids = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    return [Rendered(row, [int(x) for x in rng.integers(0, 2, len(row))]) for row in ids]


def all_of(batches: Batches) -> list[Batch]:
    served: list[Batch] = []
    while True:
        try:
            served.append(batches.next())
        except DataEnded:
            return served


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in Batch.__annotations__)


def documents_in(batches: Any) -> list[tuple[tuple[int, ...], ...]]:
    """(ids, targets, mask, positions) of every segment of every row, sorted."""
    found: list[tuple[tuple[int, ...], ...]] = []
    for batch in batches:
        for b in range(len(batch["ids"])):
            for segment in range(1, batch["segments"][b].max() + 1):
                here = batch["segments"][b] == segment
                keys = ("ids", "targets", "mask", "positions")
                found.append(tuple(tuple(int(x) for x in batch[key][b][here]) for key in keys))
    return sorted(found)


def test_batches_have_the_documented_shapes_and_dtypes(shards: TokenShards):
    for batches in (PretrainBatches(shards, 3, 16, 0), EpisodeBatches(random_episodes(9, 17), 3, 16, 0)):
        for batch in all_of(batches):
            arrays = (batch["ids"], batch["targets"], batch["mask"], batch["positions"], batch["segments"])
            assert [array.dtype.name for array in arrays] == ["int32", "int32", "float32", "int32", "int32"]
            assert {array.shape for array in arrays} == {(3, 16)}
            assert ((batch["mask"] == 0) | (batch["segments"] > 0)).all()


# -- Windows of the token stream ---------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 64, 5000])
def test_each_token_is_predicted_once_from_its_own_document_only(shards: TokenShards, T: int):
    """Rebuilds (previous token, token) pairs from the batches and from the documents."""
    edges = [*shards.starts.tolist(), shards.tokens]
    expected: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(edges):
        ids = shards.read(start, stop).tolist()
        expected += itertools.pairwise(ids)
    found: list[tuple[int, int]] = []
    batches = PretrainBatches(shards, 4, T, seed=3)
    for batch in all_of(batches):
        on = batch["mask"] > 0
        found += zip(batch["ids"][on].tolist(), batch["targets"][on].tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    assert len(found) == batches.tokens_per_epoch


def test_end_of_text_predicts_nothing(shards: TokenShards):
    end = shards.tokenizer().special("end_of_text").id
    for batch in all_of(PretrainBatches(shards, 4, 50, seed=0)):
        assert (batch["mask"][batch["ids"] == end] == 0).all()
        # every other real token but the last of the stream predicts its successor
        inside = (batch["segments"] > 0) & (batch["ids"] != end)
        assert (batch["mask"][inside] == 1).all()


def test_segments_and_positions_restart_with_each_document(shards: TokenShards):
    end = shards.tokenizer().special("end_of_text").id
    for batch in all_of(PretrainBatches(shards, 4, 50, seed=0)):
        for b in range(4):
            position, segment = -1, 1
            for t in range(50):
                if batch["segments"][b, t] == 0:
                    assert not batch["segments"][b, t:].any()
                    assert not batch["positions"][b, t:].any()
                    break
                if t and batch["ids"][b, t - 1] == end:
                    position, segment = -1, segment + 1
                position += 1
                assert (batch["positions"][b, t], batch["segments"][b, t]) == (position, segment)


def test_windows_are_the_stream_in_a_permuted_order(shards: TokenShards):
    T = 64
    stream = shards.read(0, shards.tokens)
    windows = {tuple(stream[i : i + T].tolist()) for i in range(0, len(stream) - 1, T)}
    served: list[tuple[int, ...]] = []
    for batch in all_of(PretrainBatches(shards, 4, T, seed=1)):
        for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
            if segments.any():
                served.append(tuple(ids[segments > 0].tolist()))
    assert set(served) == windows
    assert len(served) == len(windows)
    assert served != sorted(served, key=lambda ids: stream.tolist().index(ids[0]))


def test_a_corpus_smaller_than_a_batch_gives_one_padded_batch(shards: TokenShards):
    (batch,) = all_of(PretrainBatches(shards, 4, 10_000, seed=0))
    assert (batch["segments"].max(axis=1) > 0).sum() == 1
    assert batch["mask"].sum() == shards.tokens - shards.documents


# -- Episodes ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), longest=st.integers(2, 33), seed=st.integers(0, 99))
def test_packed_rows_hold_exactly_the_unpacked_episodes(count: int, longest: int, seed: int):
    episodes = random_episodes(count, longest, seed)
    packed = all_of(EpisodeBatches(episodes, 2, 32, seed))
    unpacked = all_of(EpisodeBatches(episodes, 2, 32, seed, packed=False))
    assert documents_in(packed) == documents_in(unpacked)
    assert len(documents_in(packed)) == count
    assert len(packed) <= len(unpacked)


def test_an_episode_trains_on_exactly_its_masked_tokens():
    episodes = random_episodes(30, 33)
    expected = sorted(id for e in episodes for id, trains in zip(e.ids[1:], e.mask[1:], strict=True) if trains)
    for packed in (True, False):
        batches = EpisodeBatches(episodes, 4, 32, 0, packed=packed)
        served = all_of(batches)
        on = [batch["mask"] > 0 for batch in served]
        targets = np.concatenate([batch["targets"][m] for batch, m in zip(served, on, strict=True)])
        assert sorted(targets.tolist()) == expected
        assert batches.tokens_per_epoch == len(expected)
        # ids are unique, so the target after place t of the same episode is ids[t] + 1
        for batch, m in zip(served, on, strict=True):
            assert (batch["targets"][m] == batch["ids"][m] + 1).all()


def test_packing_fills_rows():
    episodes = random_episodes(500, 17)
    places = sum(len(e.ids) - 1 for e in episodes)
    rows = len(EpisodeBatches(episodes, 1, 64, 0).rows)
    assert rows <= 1.03 * places / 64 + 1


def test_packing_looks_at_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch):
    from jaxgpt.data.batches import EpisodeRows

    monkeypatch.setattr(EpisodeRows, "OPEN_ROWS", 2)
    episodes = random_episodes(50, 33)
    assert len(documents_in(all_of(EpisodeBatches(episodes, 2, 32, 0)))) == 50


def test_an_episode_that_does_not_fit_is_refused_never_cut():
    with pytest.raises(InputError, match=r"episodes have 2 to 34 tokens, expected 2 to 33"):
        EpisodeBatches([Rendered([1, 2], [0, 1]), Rendered([1] * 34, [1] * 34)], 1, 32, 0)
    with pytest.raises(InputError, match=r"no episodes to train on"):
        EpisodeBatches([], 1, 32, 0)


# -- Epochs, position, exhaustion ------------------------------------------------------------


def sources(shards: TokenShards, **changes: Any) -> list[Batches]:
    options: dict[str, Any] = {"batch_size": 3, "sequence_length": 32, "seed": 5, "epochs": 3} | changes
    episodes = random_episodes(40, 33)
    return [
        PretrainBatches(shards, **options),
        EpisodeBatches(episodes, **options),
        EpisodeBatches(episodes, **options, packed=False),
    ]


def test_exhaustion_is_loud_and_names_the_step(shards: TokenShards):
    for batches in sources(shards, epochs=None):
        served = len(all_of(batches))
        assert served == batches.steps_per_epoch == batches.total_batches
        with pytest.raises(DataEnded):
            batches.next()
        with pytest.raises(DataEnded) as error:
            batches.next()
        assert error.value.batches == served
        assert str(error.value) == f"corpus ended after {served} batches; pass --epochs to repeat"
        told = error.value.at_step(812, 2000)
        assert isinstance(told, DataEnded)
        assert isinstance(told, InputError)
        assert str(told) == "corpus ended at step 812 of 2000; pass --epochs to repeat"


def test_epochs_serve_everything_that_often_in_different_orders(shards: TokenShards):
    for one, three in zip(sources(shards, epochs=1), sources(shards), strict=True):
        once, thrice = all_of(one), all_of(three)
        assert len(thrice) == three.total_batches
        assert documents_in(thrice) == sorted(documents_in(once) * 3)
        assert three.epoch == pytest.approx(3.0, abs=3 / len(three.rows))
        n = len(three.rows) // 3
        rows = np.concatenate([batch["ids"] for batch in thrice])[: 2 * len(three.rows)]
        assert not np.array_equal(rows[: n * 3], rows[len(three.rows) :][: n * 3])


def test_the_same_seed_gives_the_same_batches_and_another_does_not(shards: TokenShards):
    for a, b, c in zip(sources(shards), sources(shards), sources(shards, seed=6), strict=True):
        first, again, other = all_of(a), all_of(b), all_of(c)
        assert all(map(same, first, again))
        assert not all(map(same, first, other))


@pytest.mark.parametrize("at", [0, 1, 4, 11])
def test_after_seek_the_batches_are_those_of_the_uninterrupted_run(shards: TokenShards, at: int):
    for whole, resumed in zip(sources(shards), sources(shards, epochs=7), strict=True):
        for _ in range(at):
            whole.next()
        position = json.loads(json.dumps(whole.position()))
        for _ in range(2):
            resumed.next()
        resumed.seek(position)
        for _ in range(5):
            assert same(whole.next(), resumed.next())


def test_an_end_reached_before_a_resume_is_still_the_end(shards: TokenShards):
    for batches, again in zip(sources(shards), sources(shards), strict=True):
        all_of(batches)
        again.seek(batches.position())
        with pytest.raises(DataEnded):
            again.next()


def refusal(batches: Batches, position: dict[str, Any]) -> str:
    before = batches.position()
    with pytest.raises(InputError) as error:
        batches.seek(position)
    assert batches.position() == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [("seed", 5, 6), ("batch_size", 3, 4), ("sequence_length", 32, 33)]
)
def test_a_changed_setting_is_refused_by_name(shards: TokenShards, name: str, ours: int, theirs: int):
    for batches, saved in zip(sources(shards), sources(shards, **{name: theirs}), strict=True):
        expected = f"{name} differs from checkpoint ({ours} vs {theirs}); resume with the same {name}"
        assert refusal(batches, saved.position()) == expected
        assert batches.fingerprint != saved.fingerprint


def test_changed_packing_is_refused(shards: TokenShards):
    _, packed, unpacked = sources(shards)
    assert refusal(packed, unpacked.position()).startswith("packed differs from checkpoint (True vs False)")


def test_changed_data_is_refused_with_both_sizes(shards: TokenShards, folder: Path):
    episodes = random_episodes(1000, 5)
    saved = EpisodeBatches(episodes, 2, 32, 0).position()
    text = refusal(EpisodeBatches(episodes[1:], 2, 32, 0), saved)
    assert text == "dataset fingerprint differs from checkpoint (999 vs 1000 rows); resume with the same data"
    flipped = [Rendered(episodes[0].ids, [1 - m for m in episodes[0].mask]), *episodes[1:]]
    assert "(1000 vs 1000 rows)" in refusal(EpisodeBatches(flipped, 2, 32, 0), saved)
    val = TokenShards(folder, "val")
    text = refusal(PretrainBatches(val, 2, 32, 0), PretrainBatches(shards, 2, 32, 0).position())
    assert f"({val.tokens} vs {shards.tokens} tokens)" in text
    assert "dataset fingerprint differs" in refusal(PretrainBatches(val, 2, 32, 0), saved)


def test_the_order_of_rows_is_frozen():
    """A resumed run depends on these numbers, under every version of NumPy."""
    assert permutation(8, seed=0, epoch=0).tolist() == FROZEN[0]
    assert permutation(8, seed=0, epoch=1).tolist() == FROZEN[1]
    assert permutation(8, seed=1, epoch=0).tolist() == FROZEN[2]


FROZEN = [[0, 2, 1, 5, 4, 3, 6, 7], [5, 3, 7, 2, 4, 1, 0, 6], [3, 5, 2, 7, 0, 6, 1, 4]]


def test_settings_no_batch_can_have_are_refused(shards: TokenShards):
    for changes, expected in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
    ):
        with pytest.raises(InputError, match=expected):
            sources(shards, **changes)


# -- Validation ------------------------------------------------------------------------------


def test_validation_is_every_row_once_in_order_and_padded(folder: Path):
    val = TokenShards(folder, "val")
    batches = validation(val, 4, 32)
    ids = np.concatenate([batch["ids"][batch["segments"] > 0] for batch in batches])
    assert np.array_equal(ids, val.read(0, val.tokens)[: len(ids)])
    assert len(ids) >= val.tokens - 1
    assert sum(batch["mask"].sum() for batch in batches) == val.tokens - val.documents
    rows = len(batches.rows)
    assert rows % 4
    assert not batches[-1]["segments"][rows % 4 :].any()
    assert same(batches[1], list(batches)[1])


def test_validation_can_be_limited_and_takes_episodes(folder: Path):
    episodes = random_episodes(30, 33)
    assert documents_in(validation(episodes, 4, 32)) == documents_in(all_of(EpisodeBatches(episodes, 4, 32, 9)))
    batches = validation(episodes, 4, 32, packed=False, limit=3)
    assert isinstance(batches, Validation)
    assert (len(batches), len(batches[:2])) == (3, 2)
    with pytest.raises(IndexError):
        batches[3]
