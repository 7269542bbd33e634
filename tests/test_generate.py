"""Generation: the cache changes nothing, the context is never outgrown, rows do not see each other."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reliability_recompiles import Compilations, generations, turns

from jaxgpt import cache as kv
from jaxgpt import generate, model, weights
from jaxgpt.buckets import Buckets
from jaxgpt.config import ModelConfig, to_hf
from jaxgpt.errors import InputError
from jaxgpt.generate import CHUNK, Conversation, Generator, Row
from jaxgpt.settings import GenerationSettings

GREEDY = GenerationSettings()
SAMPLED = GenerationSettings(temperature=1.0, top_p=0.95)
LIMIT = 150
"""Of the context: past the second size of the cache, 128 slots, and no size of it itself."""
CONFIGS = {
    name: dataclasses.replace(conftest.CONFIGS[name], num_hidden_layers=1, max_position_embeddings=LIMIT)
    for name in ("gpt2", "qwen2")
}
GPT2, QWEN2 = CONFIGS["gpt2"], CONFIGS["qwen2"]
forward = jax.jit(lambda config, params, ids: model.forward(config, params, ids).logits, static_argnums=0)


def generator(
    config: ModelConfig = QWEN2, stop_ids: Sequence[int] = (), dtype: str = "float32", real_ids: int | None = None
) -> Generator:
    params = model.cast(conftest.random_params(config), dtype)
    real = config.vocab_size if real_ids is None else real_ids
    return Generator(config, params, real_ids=real, stop_ids=stop_ids, dtype=dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 131, length).tolist()


def joined(chunks: Iterator[list[list[int]]]) -> list[list[int]]:
    return [[i for new in row for i in new] for row in zip(*chunks, strict=True)]


def run(made: Generator, rows: Sequence[Row], settings: GenerationSettings = GREEDY, chunk: int = CHUNK):
    return joined(made.stream(rows, settings, chunk))


def conversation(made: Generator, rows: int = 1, settings: GenerationSettings = GREEDY) -> Conversation:
    return Conversation(made, kv.empty(made.config, kv.bucket(rows, 1), 64, made.dtype), settings, [0] * rows)


def naive(made: Generator, ids: Sequence[int]) -> np.ndarray:
    """Logits of every position by one forward without a cache, at one shape for all."""
    padded = np.zeros((1, LIMIT), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(made.config, made.params, padded)[0, : len(ids)])


def refusal(made: Generator, *rows: Row) -> str:
    with pytest.raises(InputError) as caught:
        next(made.stream(rows, GREEDY))
    return str(caught.value)


# -- The cache changes nothing ---------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_a_forward_without_a_cache_up_to_the_edge_of_the_context(name: str):
    made = generator(CONFIGS[name])
    # Prompts around the sizes of buckets; the cache grows twice; each row ends exactly at the edge.
    rows = [Row(prompt(n, seed=n), LIMIT - n, 0) for n in (1, 15, 16, 17, 63, 64, 65, 149)]
    for row, ids in zip(rows, run(made, rows), strict=True):
        assert len(ids) == row.max_new_tokens
        # By induction over the positions: each id is the argmax after all before it.
        logits = naive(made, [*row.ids, *ids])[len(row.ids) - 1 : -1]
        chosen = logits[np.arange(len(ids)), ids]
        assert (logits.max(-1) - chosen <= conftest.rounding(logits)).all()


def test_a_batch_of_ragged_rows_generates_what_each_row_does_alone():
    made = generator()
    sizes = ((17, 30), (30, 9), (20, 1), (60, 15), (18, 4), (31, 3), (22, 2), (59, 6))
    rows = [Row(prompt(n, seed=n), budget, 7) for n, budget in sizes]
    assert len(rows) == generate.WIDE, "so many that their kernels are turned"
    for settings in (GREEDY, SAMPLED):
        together = run(made, rows, settings)
        assert [len(ids) for ids in together] == [row.max_new_tokens for row in rows]
        for row, ids in zip(rows, together, strict=True):
            assert run(made, [row], settings) == [ids]


@pytest.mark.parametrize(
    ("rows", "dtype", "turns"),
    [(generate.WIDE, "float32", True), (generate.WIDE // 2, "float32", False), (generate.WIDE, "bfloat16", False)],
)
def test_many_rows_in_float32_read_turned_kernels(rows: int, dtype: str, turns: bool, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[str]] = []

    def spy(config: ModelConfig, params: model.Params, *rest: Any) -> Any:
        seen.append({name.rpartition(".")[2] for name in params})
        raise InterruptedError

    monkeypatch.setattr(model, "forward_cached", spy)
    # A config that no other test has decoded with: what is traced already is not traced again.
    made = generator(dataclasses.replace(QWEN2, initializer_range=0.5 + rows / 64), dtype=dtype)
    talk = conversation(made, rows)
    talk.logits = jnp.zeros((rows, made.config.vocab_size))
    with pytest.raises(InterruptedError):
        list(talk.generate([1] * rows))
    assert seen == [{"weight", "bias"} if turns else {"weight", "bias", "kernel"}]


def test_the_order_of_a_batch_does_not_matter_and_seeds_make_rows_differ():
    made = generator()
    rows = [Row(prompt(20), 30, seed) for seed in (1, 2, 3)]
    forwards, backwards = run(made, rows, SAMPLED), run(made, rows[::-1], SAMPLED)
    assert forwards == backwards[::-1]
    assert len({tuple(ids) for ids in forwards}) == 3
    assert forwards == run(made, rows, SAMPLED)
    assert len({tuple(ids) for ids in run(made, rows, GREEDY)}) == 1


def test_each_position_draws_anew():
    made = generator()
    # Every id equally likely: only the noise decides.
    made.params = {name: jnp.zeros_like(array) for name, array in made.params.items()}
    one, two = run(made, [Row([1], 40, 1), Row([1, 2], 40, 1)], SAMPLED)
    assert len(set(one)) > 20
    assert one[1:] == two[:-1], "the position, not the step, names the draw"


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_chunk_size_does_not_change_the_tokens(settings: GenerationSettings):
    made = generator()
    rows = [Row(prompt(5), 50, 1), Row(prompt(40), 70, 2)]
    expected = run(made, rows, settings)
    assert all(run(made, rows, settings, chunk) == expected for chunk in (1, 3, 31, 1000))


def test_a_chunk_holds_at_most_its_size_and_no_placeholder_reaches_the_caller():
    made = generator(stop_ids=range(0, 131, 9))
    chunks = list(made.stream([Row(prompt(5), 60, 1), Row(prompt(6), 2, 2), Row(prompt(7), 25, 3)], SAMPLED, 4))
    assert all(len(chunk) == 3 for chunk in chunks)
    assert all(len(ids) <= 4 and all(0 <= i < 131 for i in ids) for chunk in chunks for ids in chunk)


def test_who_watches_a_reply_sees_its_first_id_before_the_others():
    chunks = list(generator().stream([Row(prompt(5), 10, 1)], SAMPLED, 4))
    assert [len(ids) for (ids,) in chunks] == [1, 4, 4, 1]


def test_the_first_id_waits_for_no_decode_loop_and_is_the_one_that_is_stored(monkeypatch: pytest.MonkeyPatch):
    made = generator()
    talk = conversation(made)
    talk.append([prompt(10)])
    chunks = talk.generate([6], 4)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "decode", None)
        drawn = generate.draw
        patched.setattr(generate, "draw", lambda *given: drawn(*given)._replace(ids=jnp.array([77])))
        assert next(chunks) == [[77]], "another than the loop would draw"
    (rest,) = joined(chunks)
    assert np.asarray(talk.said)[0, :16].tolist() == [*prompt(10), 77, *rest]
    assert rest == run(made, [Row([*prompt(10), 77], 5, 0)])[0]


def test_a_reply_that_is_left_after_its_first_id_begins_with_it_again():
    made = generator()
    talk = conversation(made)
    talk.append([prompt(10)])
    chunks = talk.generate([50], 4)
    first = next(chunks)
    chunks.close()
    assert talk.lengths.tolist() == [10]
    assert [joined(talk.generate([12]))[0][:1]] == first


def test_a_watched_row_without_a_budget_says_nothing():
    made = generator()
    talk = conversation(made, rows=2)
    talk.append([prompt(10), prompt(5)])
    assert [[len(ids) for ids in chunk] for chunk in talk.generate([0, 6], 4)] == [[0, 1], [0, 4], [0, 1]]
    assert talk.lengths.tolist() == [10, 11]


def test_the_cache_has_the_compute_dtype_and_still_changes_nothing_but_rounding():
    dtype = "bfloat16"
    made = generator(dtype=dtype)
    talk = conversation(made)
    assert {str(buffer.dtype) for buffer in (*talk.cache.keys, *talk.cache.values)} == {dtype}
    talk.append([prompt(10)])
    assert talk.logits is not None
    assert talk.logits.dtype == jnp.float32
    assert {str(buffer.dtype) for buffer in (*talk.cache.keys, *talk.cache.values)} == {dtype}
    (ids,) = joined(talk.generate([20]))
    logits = naive(made, [*prompt(10), *ids])[9:-1]
    noise = 16 * float(jnp.finfo(dtype).eps) * np.abs(logits).max()
    assert (logits.max(-1) - logits[np.arange(20), ids] <= noise).all()


# -- Stopping --------------------------------------------------------------------------


def test_a_row_ends_with_its_first_stop_id_and_others_go_on():
    free = run(generator(), [Row(prompt(8, seed), 40, seed) for seed in range(3)], SAMPLED)
    stop = free[0][12]
    stopped = run(generator(stop_ids=[stop]), [Row(prompt(8, seed), 40, seed) for seed in range(3)], SAMPLED)
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(stop) + 1] if stop in before else before)
    assert len(stopped[0]) <= 13


def test_every_stop_id_ends_a_row_and_none_is_assumed():
    (ids,) = run(generator(), [Row(prompt(8), 40, 0)], SAMPLED)
    assert len(ids) == 40
    assert run(generator(stop_ids=[ids[30], ids[9], 500]), [Row(prompt(8), 40, 0)], SAMPLED) == [
        ids[: min(ids.index(ids[30]), ids.index(ids[9])) + 1]
    ]


def test_a_padded_row_of_the_embedding_is_never_generated():
    config = dataclasses.replace(GPT2, num_hidden_layers=1)
    params = dict(conftest.random_params(config))
    params["embed.tokens.weight"] = params["embed.tokens.weight"].at[100:].multiply(100.0)
    rows = [Row([1, 2, 3], 40, seed) for seed in range(4)]
    for settings in (GREEDY, SAMPLED):
        free = Generator(config, params, real_ids=131, stop_ids=[], dtype="float32")
        assert max(map(max, run(free, rows, settings))) >= 100
        made = Generator(config, params, real_ids=100, stop_ids=[], dtype="float32")
        assert max(map(max, run(made, rows, settings))) < 100


def test_the_stop_id_is_stored_so_that_the_next_turn_follows_it():
    (ids,) = run(generator(), [Row(prompt(8), 20, 0)])
    made = generator(stop_ids=[ids[5]])
    talk = conversation(made)
    talk.append([prompt(8)])
    (said,) = joined(talk.generate([20]))
    assert said == ids[: ids.index(ids[5]) + 1]
    assert talk.lengths.tolist() == [8 + len(said)] == talk.cache.lengths.tolist()
    assert np.abs(np.asarray(talk.logits) - naive(made, [*prompt(8), *said])[-1]).max() < 1e-4


# -- Conversations ---------------------------------------------------------------------


def test_appending_and_generating_in_turns_equals_one_fresh_run():
    made = generator()
    talk = conversation(made, rows=2)
    said = [prompt(3, 1), prompt(20, 2)]
    talk.append(said)
    for turn in range(3):
        for row, ids in enumerate(joined(talk.generate([5 + turn, 9]))):
            said[row] = said[row] + ids
        new = [prompt(1 + 20 * turn, 10 + turn), prompt(2, 20 + turn)]
        talk.append(new)
        said = [old + more for old, more in zip(said, new, strict=True)]
        assert talk.lengths.tolist() == [len(ids) for ids in said]
    for row, ids in enumerate(said):
        logits = naive(made, ids)
        assert np.abs(np.asarray(talk.logits)[row] - logits[-1]).max() < conftest.rounding(logits)


def test_the_cache_grows_in_the_middle_of_a_reply_and_nothing_changes():
    made = generator()
    talk = conversation(made)
    talk.append([prompt(50)])
    (ids,) = joined(talk.generate([90]))
    assert talk.cache.slots == 256
    logits = naive(made, [*prompt(50), *ids])[49:-1]
    assert (logits.max(-1) - logits[np.arange(90), ids] <= conftest.rounding(logits)).all()


def test_forgetting_the_tail_equals_never_having_read_it():
    made = generator()
    talk, fresh = conversation(made), conversation(made)
    talk.append([prompt(70)])
    list(talk.generate([30]))
    talk.forget([20])
    with pytest.raises(AssertionError, match="append tokens first"):
        next(talk.generate([1]))
    for each, ids in ((talk, prompt(6, 9)), (fresh, [*prompt(70)[:20], *prompt(6, 9)])):
        each.append([ids])
    assert joined(talk.generate([40])) == joined(fresh.generate([40]))
    with pytest.raises(AssertionError, match="cannot keep more than it holds"):
        talk.forget([67])


def test_a_conversation_stopped_in_the_middle_holds_exactly_what_was_seen():
    made = generator()
    talk = conversation(made)
    talk.append([prompt(10)])
    chunks = talk.generate([50], 4)
    seen = [*next(chunks)[0], *next(chunks)[0]]
    chunks.close()
    assert talk.lengths.tolist() == [10 + 1 + 4]
    assert seen + joined(talk.generate([12]))[0] == run(made, [Row(prompt(10), 17, 0)])[0]


def test_a_row_cannot_append_nothing():
    talk = conversation(generator(), rows=2)
    with pytest.raises(InputError, match="row 1 appends nothing; give each row at least one token"):
        talk.append([[1], []])


# -- What was said before --------------------------------------------------------------


CERTAIN = GenerationSettings(temperature=1.0, top_k=1)
"""The most likely id after the penalties, which strict greedy does not apply."""


def by_transformers(made: Generator, ids: list[int], new: int, **penalties: Any) -> list[int]:
    """Greedy decoding of the same weights by transformers' own loop and processors."""
    keys = to_hf(made.config, "float32")
    hf = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    hf.bos_token_id = hf.eos_token_id = None
    peer = transformers.AutoModelForCausalLM.from_config(hf)
    arrays = {name: torch.tensor(np.asarray(array)) for name, array in weights.to_hf(made.config, made.params).items()}
    peer.load_state_dict(arrays, strict=False)
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = peer.eval().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **penalties,
        )
    return out[0, len(ids) :].tolist()


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_give_the_tokens_of_transformers_over_prompt_and_reply_of_ragged_rows(penalties: dict[str, Any]):
    made = generator(GPT2)
    # Few ids, so that there is something to repeat; the cache grows in the middle.
    prompts = [prompt(20)[:4] * 5, [5, 6] * 3, prompt(50)]
    settings = dataclasses.replace(CERTAIN, **penalties)
    ours = run(made, [Row(ids, 40, 0) for ids in prompts], settings)
    assert ours == [by_transformers(made, ids, 40, **penalties) for ids in prompts]
    assert ours != run(made, [Row(ids, 40, 0) for ids in prompts], GREEDY)


def test_a_forgotten_reply_is_not_repeated_and_turns_are_one_history():
    made = generator()
    settings = dataclasses.replace(CERTAIN, repetition_penalty=1.5, no_repeat_ngram_size=2)
    talk = conversation(made, settings=settings)
    talk.append([prompt(60)])
    list(talk.generate([30]))
    talk.forget([20])
    talk.append([prompt(6, 9)])
    (first,) = joined(talk.generate([8]))
    talk.append([prompt(3, 4)])
    (second,) = joined(talk.generate([8]))
    whole = [*prompt(60)[:20], *prompt(6, 9)]
    assert run(made, [Row(whole, 8, 0)], settings) == [first]
    assert run(made, [Row([*whole, *first, *prompt(3, 4)], 8, 0)], settings) == [second]


# -- Log-probabilities -----------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, repetition_penalty=1.5)])
def test_logprobs_are_those_of_a_forward_without_a_cache(settings: GenerationSettings):
    made = generator()
    rows = [Row(prompt(9), 40, 1), Row(prompt(30), 7, 2)]
    chunks = list(made.chunks(rows, dataclasses.replace(settings, logprobs=True), 6))
    for place, row in enumerate(rows):
        ids = [i for chunk in chunks for i in chunk.ids[place]]
        logprobs = [value for chunk in chunks for value in (chunk.logprobs or [])[place]]
        logits = naive(made, [*row.ids, *ids])[len(row.ids) - 1 : -1]
        expected = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()[np.arange(len(ids)), ids]
        assert len(logprobs) == len(ids) == row.max_new_tokens
        assert np.abs(np.array(logprobs) - expected).max() < 2 * conftest.rounding(logits)
    assert all(chunk.logprobs is None for chunk in made.chunks(rows, settings))


# -- The edge of the context -----------------------------------------------------------


def test_what_would_outgrow_the_context_is_refused_before_anything_runs():
    config = dataclasses.replace(GPT2, max_position_embeddings=1024)
    # Without parameters nothing could run.
    made = Generator(config, {}, real_ids=131, stop_ids=[], dtype="float32")
    assert refusal(made, Row([1], 5, 0), Row([1] * 1100, 128, 0)) == (
        "prompt is 1,100 tokens; limit 1,024 including 128 to generate"
    )
    assert refusal(made, Row([1] * 1000, 25, 0)) == "prompt is 1,000 tokens; limit 1,024 including 25 to generate"
    made.check([Row([1] * 1000, 24, 0)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], 5, 0), "the prompt is empty; give at least one token"),
        (Row([1], 0, 0), "max_new_tokens must be at least 1, got 0"),
        (Row([1, 131, 500], 5, 0), "token 131 outside vocabulary 0–130"),
        (Row([-1], 5, 0), "token -1 outside vocabulary 0–130"),
    ],
)
def test_a_row_that_cannot_be_continued_is_refused(row: Row, message: str):
    made = Generator(GPT2, {}, real_ids=131, stop_ids=[], dtype="float32")
    assert refusal(made, Row([1], 5, 0), row) == message


def test_a_conversation_cannot_outgrow_the_context_either():
    talk = conversation(generator())
    talk.append([prompt(LIMIT - 10)])
    with pytest.raises(InputError, match="140 tokens and 11 more; limit 150"):
        next(talk.generate([11]))
    with pytest.raises(InputError, match="140 tokens and 11 more; limit 150"):
        talk.append([prompt(11)])
    assert len(joined(talk.generate([10]))[0]) == 10
    with pytest.raises(InputError, match="150 tokens and 1 more; limit 150"):
        talk.append([[1]])


# -- Broken weights --------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_are_an_error_and_never_token_0(value: float, settings: GenerationSettings):
    made = generator()
    made.params = {**made.params, "final_norm.weight": made.params["final_norm.weight"].at[3].set(value)}
    chunks = made.stream([Row(prompt(5), 10, 0)], settings)
    with pytest.raises(InputError, match=r"logits are NaN or infinite; run `jaxgpt inspect` on the checkpoint"):
        next(chunks)


def test_an_id_whose_embedding_is_nan_breaks_only_when_it_is_read_and_then_loudly():
    made = generator()
    (ids,) = run(made, [Row(prompt(5), 20, 0)])
    embedding = made.params["embed.tokens.weight"].at[ids[10]].set(jnp.nan)
    made.params = {**made.params, "embed.tokens.weight": embedding}
    chunks = made.stream([Row(prompt(5), 20, 0)], GREEDY, 1)
    until = ids.index(ids[10]) + 1
    assert [next(chunks)[0][0] for _ in range(until)] == ids[:until]
    with pytest.raises(InputError, match="NaN or infinite"):
        next(chunks)


# -- Speed that can be counted ---------------------------------------------------------


def test_the_cache_is_updated_in_place():
    made = generator()
    talk = conversation(made)
    buffers = [*talk.cache.keys, *talk.cache.values, talk.said]
    talk.append([prompt(5)])
    assert all(buffer.is_deleted() for buffer in buffers)
    assert talk.logits is not None
    buffers = [*talk.cache.keys, *talk.cache.values, talk.said, talk.logits]
    list(talk.generate([5]))
    assert all(buffer.is_deleted() for buffer in buffers)


@pytest.mark.slow
def test_after_warm_up_50_ragged_generations_and_50_turns_compile_nothing_and_an_unwarmed_size_does():
    # No other test's programs; one layer, since 28 are compiled.
    config = dataclasses.replace(GPT2, max_position_embeddings=128, vocab_size=97, num_hidden_layers=1)
    made = generator(config)
    buckets = Buckets.upto(batch=2, prompt=32, tokens=128)
    assert str(buckets) == "batches 1, 2; prompts 16, 32; caches 64, 128: at most 28 programs"
    compiled = Compilations()
    made.warm_up(buckets)
    # Two batches, each with two caches' zeros, first id, decode loop and two prefills, and what doubles the smaller.
    assert 20 <= compiled.reset() <= buckets.programs
    generations(made, 97)
    turns(made, 97)
    assert compiled.reset() == 0
    run(made, [Row([1] * 33, 5, 0)])
    assert compiled.reset() == 1, "a prompt of another size is one more prefill"
    run(made, [Row([1], 5, 0)] * 3)
    assert compiled.count > 1, "and another batch more than that"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "batch must be at least 1, got 0"),
        ((1, 100, 99), "a prompt of 100 does not fit 99 tokens; raise tokens or lower prompt"),
        ((1, 1, 257), "cannot warm up for 512 tokens; the context holds 150"),
    ],
)
def test_sizes_that_cannot_be_warmed_up_are_refused(sizes: tuple[int, int, int], message: str):
    made = Generator(GPT2, {}, real_ids=131, stop_ids=[], dtype="float32")
    with pytest.raises(InputError, match=message):
        made.warm_up(Buckets.upto(*sizes))


@pytest.mark.parametrize(
    ("tokens", "minimum", "slots"), [(0, 64, 64), (64, 64, 64), (65, 64, 128), (128, 64, 128), (1, 1, 1), (3, 1, 4)]
)
def test_buckets_are_powers_of_two(tokens: int, minimum: int, slots: int):
    assert kv.bucket(tokens, minimum) == slots


def test_a_grown_cache_holds_the_same_tokens_and_never_shrinks():
    made = generator()
    talk = conversation(made)
    talk.append([prompt(50)])
    grown = kv.grown(talk.cache, 256)
    assert grown.slots == 256
    assert kv.grown(grown, 64) is grown
    assert np.array_equal(grown.keys[0][:, :, :64], talk.cache.keys[0])
    assert not np.asarray(grown.values[0][:, :, 64:]).any()
