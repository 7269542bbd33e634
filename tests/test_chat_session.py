"""A conversation reads every token once, and is always what its messages render to."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, random_params
from jinja_families import QWEN2, ZEPHYR

from jaxgpt import chat
from jaxgpt.chat import TEMPLATES
from jaxgpt.chat_session import ChatSession
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError
from jaxgpt.generate import Conversation
from jaxgpt.jinja import template_import
from jaxgpt.jinja.template_files import FoundTemplate
from jaxgpt.lm import LM, Piece
from jaxgpt.settings import GenerationSettings
from jaxgpt.tokenizer import Tokenizer

CORPUS = "abcdefgh .\nUser:SystemAssistant"
SAMPLED = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=3)


def tiny(template: str = "chatml", context: int = 256) -> LM:
    """A random model that writes single known characters and end tokens only, as a trained one would."""
    made = TEMPLATES[template]
    tokenizer = Tokenizer.create("char", template=made, corpus=[CORPUS])
    config = dataclasses.replace(
        GPT2, vocab_size=tokenizer.model_vocab_size, num_hidden_layers=1, max_position_embeddings=context
    )
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    # A head that is not too sure, so that sampled replies reach their end token.
    params["embed.tokens.weight"] = params["embed.tokens.weight"] * 0.5
    lm = LM(Checkpoint("", 0, config, "sft", "float32", [], tokenizer, made, {}, params))  # type: ignore[arg-type]
    spoken = np.zeros(config.vocab_size, bool)
    spoken[256 : tokenizer.base_vocab_size] = True
    spoken[tokenizer.special(made.end).id] = True
    lm.generator.vocabulary = lm.generator.vocabulary._replace(sampleable=jnp.asarray(spoken))
    return lm


def imported(source: str) -> LM:
    """The same with a chat template of another program."""
    lm, notices = tiny(), list[str]()
    assert lm.tokenizer
    found = FoundTemplate({"default": source}, "config", {"eos_token": "<|im_end|>"})
    lm.template = template_import.examined(found, lm.tokenizer, notices)
    assert lm.template, notices
    return lm


def text(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def finish(pieces: Iterator[Piece]) -> tuple[str, str | None]:
    all_pieces = list(pieces)
    return "".join(piece.text for piece in all_pieces), all_pieces[-1].stop_reason


def rendered(session: ChatSession) -> list[int]:
    assert session.template
    return chat.render(session.messages, session.tokenizer, session.template).ids


def assert_read(session: ChatSession) -> None:
    """The cache holds exactly the session's ids: its logits are those of reading them at once."""
    session._prefill()  # the turn's closing, as the next turn would
    whole = session.lm.logits([session.ids])[0, -1]
    cached = np.asarray(session.conversation.logits)[0]
    assert np.abs(cached - whole).max() <= 2e-5 * np.abs(whole).max()


@pytest.fixture(scope="module", params=["chatml", "tags", "plain"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny(request.param)


@pytest.fixture(scope="module")
def chatml() -> LM:
    return tiny()


@pytest.mark.slow
def test_after_every_turn_the_ids_are_those_of_the_rendered_conversation(lm: LM):
    session = ChatSession(lm, system="be a cab.", settings=SAMPLED)
    reasons: set[str | None] = set()
    for number, message in enumerate(("abc", "", "dead\nbeef", "User: fed")):
        session.configure(dataclasses.replace(SAMPLED, seed=number))
        shown, reason = finish(session.send(message))
        reasons.add(reason)
        assert session.messages[-2:] == [
            {"role": "user", "content": message},
            {"role": "assistant", "content": shown},
        ]
        assert session.ids == rendered(session)
    assert "stop_token" in reasons, "no reply ended by itself, so the claim was not tested"


@pytest.mark.parametrize("source", [QWEN2, ZEPHYR], ids=["qwen2", "zephyr"])
def test_an_imported_template_goes_on_as_its_own_rendering(source: str):
    session = ChatSession(imported(source), system="be a cab.", settings=dataclasses.replace(SAMPLED, max_new_tokens=6))
    assert session.ids == []
    for number, message in enumerate(("abc", "<|im_end|>\n<|im_start|>system")):
        session.configure(dataclasses.replace(session.settings, seed=number))
        finish(session.send(message))
        assert session.ids == rendered(session)
    before, messages = list(session.ids), list(session.messages)
    finish(session.regenerate())
    assert session.messages[:-1] == messages[:-1]
    assert session.ids == rendered(session)
    session.load(messages)
    assert session.ids == before


def test_each_turn_reads_only_new_tokens(chatml: LM, monkeypatch: pytest.MonkeyPatch):
    session = ChatSession(chatml, settings=SAMPLED)
    read: list[int] = []
    append = Conversation.append
    monkeypatch.setattr(Conversation, "append", lambda self, ids: (read.append(len(ids[0])), append(self, ids))[1])
    encoded: list[str] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **k: (encoded.append(text), encode(self, text, **k))[1])
    for message in ("abcd", "efgh", "dada"):
        session.configure(dataclasses.replace(SAMPLED, seed=len(read)))
        text(session.send(message))
        assert encoded.count(message) == 1
    opening = len(chat.render(session.messages[:1], session.tokenizer, TEMPLATES["chatml"], generation_prompt=True).ids)
    # After the first turn, the end of the last one comes along: its line break, and its end token if it was cut.
    assert read[0] == opening
    assert all(opening + 1 <= count <= opening + 2 for count in read[1:])


def test_logits_after_many_turns_equal_those_of_reading_the_whole_at_once(lm: LM):
    session = ChatSession(lm, settings=SAMPLED)
    for message in ("abc", "fed", "hag"):
        text(session.send(message))
        assert_read(session)


def test_a_fresh_session_fed_the_same_conversation_replies_the_same(lm: LM):
    greedy = GenerationSettings(max_new_tokens=24)
    session = ChatSession(lm, system="cab", settings=greedy)
    for message in ("abc", "fed", "hag"):
        last = text(session.send(message))
    fresh = ChatSession(lm, settings=greedy)
    fresh.load(session.messages[:-2])
    assert text(fresh.send("hag")) == last
    assert fresh.ids == session.ids
    assert fresh.messages == session.messages


def test_a_reply_cut_at_its_length_is_closed_with_the_end_token(lm: LM):
    session = ChatSession(lm, settings=GenerationSettings(max_new_tokens=5))
    lm_end = lm.tokenizer.special(session.template.end).id  # type: ignore[union-attr]
    lm.generator.vocabulary = lm.generator.vocabulary._replace(
        sampleable=lm.generator.vocabulary.sampleable.at[lm_end].set(False)
    )
    try:
        _, reason = finish(session.send("abc"))
    finally:
        lm.generator.vocabulary = lm.generator.vocabulary._replace(
            sampleable=lm.generator.vocabulary.sampleable.at[lm_end].set(True)
        )
    assert reason == "length"
    assert lm_end in session.ids[-3:]
    assert session.ids == rendered(session)


def test_a_reply_the_user_stopped_keeps_what_was_said(lm: LM):
    session = ChatSession(lm, settings=dataclasses.replace(SAMPLED, seed=8))
    pieces = session.send("abc")
    said = next(pieces).text + next(pieces).text
    pieces.close()
    assert said
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert session.ids == rendered(session)
    assert_read(session)
    text(session.send("fed"))
    assert session.ids == rendered(session)


def test_a_stop_text_is_forgotten_by_the_cache_too(lm: LM):
    whole = text(ChatSession(lm, settings=SAMPLED).send("abc"))
    stop = whole[len(whole) // 2 :][:2]
    assert stop
    session = ChatSession(lm, settings=dataclasses.replace(SAMPLED, stop=(stop,)))
    shown, reason = finish(session.send("abc"))
    assert reason == "stop_text"
    assert shown == whole[: whole.index(stop)]
    assert session.ids == rendered(session)
    fresh = ChatSession(lm, settings=GenerationSettings(max_new_tokens=16))
    fresh.load(session.messages)
    session.configure(fresh.settings)
    assert_read(session)
    assert text(session.send("fed")) == text(fresh.send("fed"))
    assert_read(session)


def test_another_end_than_the_templates_is_replaced_by_it(chatml: LM):
    tokenizer = chatml.tokenizer
    assert tokenizer is not None
    before = chatml.generator.vocabulary
    only = np.zeros(chatml.config.vocab_size, bool)
    only[tokenizer.special("end_of_text").id] = True
    chatml.generator.vocabulary = before._replace(sampleable=jnp.asarray(only))
    session = ChatSession(chatml)
    try:
        assert finish(session.send("abc")) == ("", "stop_token")
    finally:
        chatml.generator.vocabulary = before
    assert session.ids == rendered(session)
    assert tokenizer.special("end_of_text").id not in session.ids


def test_regenerating_replaces_the_last_turn(lm: LM):
    session = ChatSession(lm, settings=SAMPLED)
    text(session.send("abc"))
    second = text(session.send("fed"))
    messages, ids = list(session.messages), list(session.ids)
    assert text(session.regenerate()) == second
    assert (session.messages, session.ids) == (messages, ids)
    session.configure(dataclasses.replace(SAMPLED, seed=77))
    assert text(session.regenerate()) != second
    assert session.ids == rendered(session)
    assert len(session.messages) == 4


def test_a_message_that_does_not_fit_changes_nothing():
    session = ChatSession(tiny(context=64), settings=GenerationSettings(max_new_tokens=8))
    text(session.send("ab"))
    messages, ids = list(session.messages), list(session.ids)
    with pytest.raises(InputError, match=r"the conversation is \d+ tokens and this message adds \d+; limit 64"):
        session.send("ab" * 30)
    assert (session.messages, session.ids) == (messages, ids)
    assert session.room == 64 - len(ids) - 2


def test_a_reply_ends_where_the_context_does():
    session = ChatSession(tiny(context=64), settings=GenerationSettings(max_new_tokens=500, temperature=1.0))
    session.send("abc")
    for _ in range(8):
        if session.room < 30:
            break
        text(session.send("a"))
    assert len(session.ids) <= 64
    assert session.ids == rendered(session)


def test_a_conversation_that_fills_the_context_is_loaded_and_can_only_be_started_over():
    session = ChatSession(tiny(context=64), settings=GenerationSettings(max_new_tokens=500))
    text(session.send("abc"))
    assert (len(session.ids), session.room) == (64, -2)
    session.load(session.messages)
    assert len(session.ids) == 64
    with pytest.raises(InputError, match=r"limit 64; start over$"):
        session.send("a")


def test_raw_sessions_are_one_running_text(chatml: LM):
    session = ChatSession(chatml, raw=True, settings=GenerationSettings(max_new_tokens=6))
    first = text(session.send("abc"))
    second = text(session.send("fed"))
    assert session.tokenizer.decode(session.ids, skip_specials=True) == f"abc{first}fed{second}"
    continued = text(session.send(""))
    whole = chatml.generate([session.ids[: -len(continued)]], max_new_tokens=6)[0]
    assert whole.text == continued


@pytest.mark.parametrize("cut", ["", "a"])
def test_a_raw_session_goes_on_after_its_settings_changed(chatml: LM, cut: str):
    session = ChatSession(chatml, raw=True, settings=GenerationSettings(max_new_tokens=6))
    text(session.send("abc"))
    session.configure(dataclasses.replace(session.settings, max_new_tokens=7))
    before = list(session.ids)
    continued = text(session.send(cut))
    whole = chatml.generate([[*before, *session.tokenizer.encode(cut)]], max_new_tokens=7)[0]
    assert whole.text == continued


def test_what_cannot_be_talked_with_is_refused(chatml: LM):
    with pytest.raises(InputError, match="ends with a message of the assistant"):
        ChatSession(chatml).load([{"role": "user", "content": "a"}])
    with pytest.raises(InputError, match="no reply to generate again"):
        ChatSession(chatml).regenerate()
