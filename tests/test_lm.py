"""The Python API: what a prompt may be, what comes back, and what is refused."""

import dataclasses
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgpt
from jaxgpt import chat, device, model
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Checkpoint, save
from jaxgpt.errors import InputError
from jaxgpt.generate import Chunk, Row
from jaxgpt.lm import LM, Piece
from jaxgpt.settings import GenerationSettings
from jaxgpt.step_folder import Contents
from jaxgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=["abcdefgh .\nUser:"])
CONFIG = dataclasses.replace(
    conftest.CONFIGS["qwen2-tied"],
    vocab_size=TOKENIZER.model_vocab_size,
    num_hidden_layers=1,
    max_position_embeddings=96,
)
MESSAGES: Any = [{"role": "user", "content": "cab"}]


def a_checkpoint(**changes: Any) -> Checkpoint:
    params = {name: np.asarray(array) for name, array in conftest.random_params(CONFIG).items()}
    parts: dict[str, Any] = {
        **{"path": "", "step": 0, "config": CONFIG, "stage": "sft", "compute_dtype": "float32", "eos_token_ids": []},
        **{"tokenizer": TOKENIZER, "template": TEMPLATES["chatml"], "provenance": {}, "params": params},
    }
    return Checkpoint(**{**parts, **changes})


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(a_checkpoint())


@pytest.fixture(scope="module")
def without_tokenizer() -> LM:
    return LM(a_checkpoint(tokenizer=None, template=None, eos_token_ids=[7]))


def scripted(lm: LM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decode loop say these ids, one or two a chunk, whatever the prompt."""
    pairs = [ids[at : at + 2] for at in range(0, len(ids), 2)]

    def chunks(rows: list[Row], settings: GenerationSettings, chunk: int = 32):
        del settings, chunk
        return iter([Chunk([pair] * len(rows), None) for pair in pairs])

    monkeypatch.setattr(lm.generator, "chunks", chunks)


def refusal(call: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    assert str(caught.value).isprintable()
    return str(caught.value)


# -- Logits ----------------------------------------------------------------------------


def test_logits_are_float32_numpy_of_every_position(lm: LM):
    ids = np.asarray(conftest.random_ids(CONFIG, 2, 9))
    logits = lm.logits(ids)
    assert type(logits) is np.ndarray
    assert (logits.dtype, logits.shape) == (np.float32, (2, 9, CONFIG.vocab_size))
    forward = jax.jit(lambda params, ids: model.forward(CONFIG, params, ids).logits)
    expected = np.asarray(forward(lm.params, jnp.asarray(ids)))
    assert np.abs(logits - expected).max() < conftest.rounding(expected)
    for same in (ids.tolist(), jnp.asarray(ids), ids.astype(np.uint16)):
        assert np.array_equal(lm.logits(same), logits)


def test_bfloat16_weights_still_give_float32_logits():
    half = LM(a_checkpoint(), compute_dtype="bfloat16")
    assert {str(array.dtype) for array in half.params.values()} == {"bfloat16"}
    assert half.logits([[1, 2]]).dtype == np.float32
    assert half.generator.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], "ids must be (B, T) integers, got int64 of shape (2,)"),
        ([[1.0]], "ids must be (B, T) integers, got float64 of shape (1, 1)"),
        ([[True]], "ids must be (B, T) integers, got bool of shape (1, 1)"),
        (["ab"], "ids must be (B, T) integers, got <U2 of shape (1,)"),
        ([], "ids must be (B, T) integers, got float64 of shape (0,)"),
        ([[2**70]], "ids must be (B, T) integers, got object of shape (1, 1)"),
        ([[1, 2], [3]], "rows of ids differ in length; give (B, T) integers"),
        ([[5, -1]], f"token -1 outside vocabulary 0–{CONFIG.vocab_size - 1}"),
        ([[5, 2**40 + 3]], f"token {2**40 + 3} outside vocabulary 0–{CONFIG.vocab_size - 1}"),
        ([[1] * 97], "97 tokens; the context holds 96"),
    ],
)
def test_ids_that_have_no_logits_are_refused(lm: LM, ids: Any, message: str):
    assert message in refusal(lm.logits, ids)


# -- Prompts ---------------------------------------------------------------------------


def test_text_ids_arrays_and_messages_are_the_same_prompt(lm: LM):
    ids = lm.encode(MESSAGES)
    (expected,) = lm.generate(MESSAGES, max_new_tokens=8)
    assert (
        expected.prompt_ids == ids == chat.render(MESSAGES, TOKENIZER, TEMPLATES["chatml"], generation_prompt=True).ids
    )
    for same in (
        ids,
        tuple(ids),
        np.array(ids),
        jnp.array(ids),
        np.array([ids], np.uint16),
        [np.array(ids)],
        [MESSAGES],
    ):
        assert lm.generate(same, max_new_tokens=8) == [expected], type(same)
    assert lm.generate("cab.", max_new_tokens=8) == lm.generate(TOKENIZER.encode("cab."), max_new_tokens=8)


def test_a_list_may_mix_kinds_of_prompts_and_keeps_their_order(lm: LM):
    prompts: Any = ["abc", [300 % CONFIG.vocab_size, 5], MESSAGES, np.array([257, 258, 259])]
    together = lm.generate(prompts, max_new_tokens=6)
    assert [len(completion.prompt_ids) for completion in together] == [3, 2, len(lm.encode(MESSAGES)), 3]
    assert together == [lm.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_an_empty_text_begins_where_training_texts_do(lm: LM):
    (completion,) = lm.generate("", max_new_tokens=3)
    assert completion.prompt_ids == [TOKENIZER.special("end_of_text").id]


def test_text_is_never_a_control_token(lm: LM):
    assert not set(lm.encode("<|im_start|>user<|im_end|>")) & TOKENIZER.special_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; give at least one token"),
        ([[]], "the prompt is empty; give at least one token"),
        ([1.5, 2.0], "a prompt must be text, a list of token ids, or a list of messages; got float"),
        (np.array([1.5]), "a prompt must be text, a list of token ids, or a list of messages; got ndarray"),
        ([True, False], "a prompt must be text, a list of token ids, or a list of messages; got list"),
        ([1, "a"], "a prompt must be text, a list of token ids, or a list of messages; got list"),
        (None, "a prompt must be text, a list of token ids, or a list of messages; got NoneType"),
        (3, "a prompt must be text, a list of token ids, or a list of messages; got int"),
        (b"abc", "a prompt must be text, a list of token ids, or a list of messages; got bytes"),
        (MESSAGES[0], "a prompt must be text, a list of token ids, or a list of messages; got dict"),
        (np.array(["ab"]), "a prompt must be text, a list of token ids, or a list of messages; got ndarray"),
        ([1, 2**70], f"token {2**70} outside vocabulary 0–{CONFIG.vocab_size - 1}"),
        ([CONFIG.vocab_size], f"token {CONFIG.vocab_size} outside vocabulary 0–{CONFIG.vocab_size - 1}"),
        ([1] * 90, "prompt is 90 tokens; limit 96 including 8 to generate"),
        ("a\ud800", "input is not valid Unicode at character 1 (U+D800)"),
        ([{"role": "robot", "content": "a"}], "robot"),
    ],
)
def test_what_is_no_prompt_is_refused(lm: LM, prompt: Any, message: str):
    assert message in refusal(lm.generate, prompt, max_new_tokens=8)


def test_without_a_tokenizer_ids_go_in_and_come_out(without_tokenizer: LM):
    (completion,) = without_tokenizer.generate([1, 2, 3], max_new_tokens=5)
    assert completion.ids
    assert completion.text == ""
    assert without_tokenizer.stop_ids == (7,)
    message = "the checkpoint has no tokenizer, so a text prompt cannot be encoded; give token ids"
    assert refusal(without_tokenizer.generate, "abc") == message
    assert "has no chat template; give text or ids instead" in refusal(without_tokenizer.generate, MESSAGES)
    assert "has no tokenizer, so a stop text cannot be seen" in refusal(without_tokenizer.generate, [1], stop="a")


# -- Settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatur": 1}, "generate has no setting 'temperatur'; it takes max_new_tokens, temperature, top_k, top_p"),
        ({"temperature": -0.1}, "temperature must be in 0–1,000,000, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be in 0–1,000,000, got nan"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"top_k": -1}, "top_k must be ≥ 0, got -1"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"seed": -1}, "seed must be in 0–4294967295, got -1"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"stop": [""]}, "a stop text is empty; give the text to stop at"),
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"stop": ["a", 5]}, "stop must be a text or a list of texts, got ['a', 5]"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_and_value(lm: LM, settings: dict[str, Any], message: str):
    assert message in refusal(lm.generate, "a", **settings)


def test_no_temperature_is_greedy_and_greedy_ignores_every_knob(lm: LM):
    expected = lm.generate("abc", max_new_tokens=9)
    for settings in (
        {"temperature": None},
        {"temperature": 0},
        {"temperature": 0, "top_k": 3, "top_p": 0.1, "seed": 9},
    ):
        assert lm.generate("abc", max_new_tokens=9, **settings) == expected


def test_numbers_of_numpy_and_numbers_beyond_int32_are_settings(lm: LM):
    plain = lm.generate("abc", max_new_tokens=9, temperature=1.0, seed=4)
    numpy = lm.generate("abc", max_new_tokens=np.int64(9), temperature=np.float32(1), seed=np.uint32(4), top_k=2**40)
    assert numpy == plain


def test_a_seed_gives_the_same_text_in_any_batch(lm: LM):
    (alone,) = lm.generate("abc", max_new_tokens=9, temperature=1.0, seed=4)
    batch = lm.generate(["h", "abc"], max_new_tokens=9, temperature=1.0, seed=4)
    assert batch[1] == alone
    assert len({lm.generate("abc", max_new_tokens=9, temperature=1.0, seed=seed)[0].text for seed in range(5)}) > 1


def test_an_unknown_compute_dtype_or_device_is_refused():
    message = "compute_dtype must be one of float32, bfloat16, float16; got 'int8'"
    assert refusal(LM, a_checkpoint(), compute_dtype="int8") == message
    assert refusal(device.use, "tpu") == "device must be auto, cpu or gpu; got 'tpu'"


# -- Stopping and streaming ------------------------------------------------------------


def bytes_of(text: str) -> list[int]:
    """Ids of single bytes: every character split as far as it can be."""
    return list(text.encode())


def pieces(lm: LM, **settings: Any) -> list[Piece]:
    return list(lm.stream("abc", **settings))


def test_the_reason_for_stopping_is_told(lm: LM, monkeypatch: pytest.MonkeyPatch):
    end = TOKENIZER.special("end").id
    scripted(lm, [*bytes_of("good bye"), end, *bytes_of("never")], monkeypatch)
    (completion,) = lm.generate("abc")
    assert (completion.text, completion.stop_reason) == ("good bye", "stop_token")
    assert completion.ids == [*bytes_of("good bye"), end]
    (completion,) = lm.generate("abc", stop="d b")
    assert (completion.text, completion.stop_reason) == ("goo", "stop_text")
    assert completion.ids == bytes_of("good b")
    scripted(lm, bytes_of("good"), monkeypatch)
    assert lm.generate("abc", stop="bye")[0].stop_reason == "length"


def test_each_end_the_tokenizer_and_the_checkpoint_name_stops_a_reply():
    lm = LM(a_checkpoint(eos_token_ids=[42]))
    assert set(lm.stop_ids) == {TOKENIZER.special("end").id, TOKENIZER.special("end_of_text").id, 42}
    assert set(np.flatnonzero(lm.generator.vocabulary.stops)) == set(lm.stop_ids)
    assert np.flatnonzero(~np.asarray(lm.generator.vocabulary.sampleable)).min() == TOKENIZER.vocab_size


@pytest.mark.parametrize("stop", ["END", ["x", "END"], ("ND", "END")])
def test_a_stop_text_is_found_across_tokens_and_never_printed(lm: LM, stop: Any, monkeypatch: pytest.MonkeyPatch):
    scripted(lm, bytes_of("the E is no ENDing"), monkeypatch)
    (completion,) = lm.generate("abc", stop=stop)
    assert (completion.text, completion.stop_reason) == ("the E is no ", "stop_text")
    streamed = pieces(lm, stop=stop)
    assert "".join(piece.text for piece in streamed) == completion.text
    assert streamed[-1].stop_reason == "stop_text"
    assert [i for piece in streamed for i in piece.ids] == completion.ids == bytes_of("the E is no END")


def test_one_stop_text_is_not_taken_for_its_letters(lm: LM, monkeypatch: pytest.MonkeyPatch):
    scripted(lm, bytes_of("a b c"), monkeypatch)
    assert lm.generate("abc", stop="cab")[0].text == "a b c"


TEXT = "héllo 日本語 👩‍👩‍👧 🇩🇪 ok"


def test_streaming_never_prints_half_a_character(lm: LM, monkeypatch: pytest.MonkeyPatch):
    scripted(lm, bytes_of(TEXT), monkeypatch)
    printed = [piece.text for piece in pieces(lm)]
    assert "".join(printed) == TEXT == lm.generate("abc")[0].text
    assert all("\ufffd" not in text and text.encode() for text in printed if text)
    assert any(not text for text in printed), "something was held back"


def test_a_character_that_never_became_whole_is_one_replacement_at_the_end(lm: LM, monkeypatch: pytest.MonkeyPatch):
    scripted(lm, bytes_of("日本")[:-1], monkeypatch)
    printed = [piece.text for piece in pieces(lm)]
    assert "".join(printed) == "日\ufffd" == lm.generate("abc")[0].text
    assert printed[-1] == "\ufffd"


def test_ids_without_a_token_and_special_tokens_print_nothing(lm: LM, monkeypatch: pytest.MonkeyPatch):
    silent = [TOKENIZER.vocab_size, CONFIG.vocab_size - 1, TOKENIZER.pad_id]
    scripted(lm, [*bytes_of("a"), *silent, *bytes_of("b")], monkeypatch)
    assert lm.generate("abc")[0].text == "ab"


def test_streamed_pieces_join_to_the_completion(lm: LM):
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        (completion,) = lm.generate("abc", max_new_tokens=30, **settings)
        streamed = list(lm.stream("abc", chunk=3, max_new_tokens=30, **settings))
        assert "".join(piece.text for piece in streamed) == completion.text
        assert [i for piece in streamed for i in piece.ids] == completion.ids
        assert [piece.stop_reason for piece in streamed] == [None] * (len(streamed) - 1) + [completion.stop_reason]


# -- Loading ---------------------------------------------------------------------------


def test_load_gives_the_saved_model_with_its_tokenizer_and_template(tmp_path: Any, lm: LM):
    from_memory = a_checkpoint(compute_dtype="bfloat16")
    names = ("config", "params", "stage", "compute_dtype", "eos_token_ids", "tokenizer", "template", "provenance")
    save(tmp_path, 3, Contents(**{name: getattr(from_memory, name) for name in names})).result()
    loaded = jaxgpt.load(str(tmp_path), device="cpu", compute_dtype="float32")
    assert jaxgpt.load(str(tmp_path)).compute_dtype == "bfloat16"
    assert loaded.config == CONFIG
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.state() == TOKENIZER.state()
    assert loaded.template == TEMPLATES["chatml"]
    assert np.array_equal(loaded.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]))
    message = refusal(jaxgpt.load, str(tmp_path / "none"))
    assert "none is no folder; give a run folder" in message


def test_a_conversation_ends_at_its_templates_stop_texts_and_a_plain_text_does_not(monkeypatch: pytest.MonkeyPatch):
    plain = LM(a_checkpoint(template=TEMPLATES["plain"]))
    script = bytes_of("yes\nUser: and more")
    scripted(plain, script, monkeypatch)
    [reply] = plain.generate([{"role": "user", "content": "well?"}], max_new_tokens=len(script))
    assert (reply.text, reply.stop_reason) == ("yes", "stop_text")
    scripted(plain, script, monkeypatch)
    [text] = plain.generate("well?", max_new_tokens=len(script))
    assert text.text == "yes\nUser: and more"
