"""Streaming text equals decoding at once, and is safe to print at every step."""

import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.chat import CHATML, TAGS
from jaxgpt.errors import InputError
from jaxgpt.text_stream import TextStream
from jaxgpt.tokenizer import Tokenizer

KINDS = ("gpt2", "char")
SPLIT = ("👩‍👩‍👧‍👦 family", "日本語", "🏳️‍🌈🙂", "é中\U0010ffff", "naïve e\u0301")


@functools.cache
def made(kind: str) -> Tokenizer:
    return Tokenizer.create(kind, template=CHATML, corpus=["abUser: \n"])


def streamed(tokenizer: Tokenizer, ids: list[int], stop_strings: tuple[str, ...] = ()) -> tuple[str, str | None]:
    stream = TextStream(tokenizer, stop_strings)
    text = "".join(map(stream.push, ids)) + stream.finish()
    return text, stream.stopped


def cut(text: str, stop_strings: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition, character by character: the stop string completed first, the longest if several are."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def some_ids(draw: st.DrawFn, kind: str) -> list[int]:
    """Ids that spell text, ids that spell nothing sensible, specials and ids without a token."""
    tokenizer = made(kind)
    written = st.text(st.characters(exclude_categories=["Cs"])).map(tokenizer.encode)
    anything = st.lists(st.integers(-1, tokenizer.model_vocab_size))
    special = st.sampled_from([[special.id] for special in tokenizer.specials])
    return list(itertools.chain(*draw(st.lists(written | anything | special))))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_the_decoded_text(kind: str, data: st.DataObject):
    ids = data.draw(some_ids(kind))
    assert streamed(made(kind), ids) == (made(kind).decode(ids, skip_specials=True), None)


@settings(max_examples=300, deadline=None)
@given(
    bytes_=st.lists(st.sampled_from([*b"ab\n", *"é中🙂".encode(), 0xFF, 0xC0])),
    stops=st.lists(st.text(st.sampled_from("ab\né中\ufffd"), min_size=1, max_size=4), max_size=3).map(tuple),
)
@example(bytes_=list(b"abab"), stops=("ab", "bab"))
@example(bytes_=list(b"aaab"), stops=("aab",))
@example(bytes_=[0xE4], stops=("\ufffd",))
def test_stop_strings_cut_where_the_definition_does(bytes_: list[int], stops: tuple[str, ...]):
    # In kind char ids below 256 are bytes: the finest split of any text into tokens.
    tokenizer = made("char")
    assert streamed(tokenizer, bytes_, stops) == cut(tokenizer.decode(bytes_), stops)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("the end\n.User:")),
    stops=st.lists(st.text(st.sampled_from("the nd\n.Us"), min_size=1, max_size=5), max_size=3).map(tuple),
)
def test_stop_strings_do_not_depend_on_token_edges(text: str, stops: tuple[str, ...]):
    for kind in KINDS:
        assert streamed(made(kind), made(kind).encode(text), stops) == cut(text, stops)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPLIT)
def test_half_a_character_is_never_printed(kind: str, text: str):
    stream = TextStream(made(kind))
    ids = made(kind).encode(text)
    assert len(ids) > len(text.split()), "the text must be split inside characters"
    printed = ""
    for id in ids:
        printed += stream.push(id)
        assert text.startswith(printed)
        assert "\ufffd" not in printed
    assert printed + stream.finish() == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_never_ends_is_one_replacement_character(kind: str):
    half = made(kind).encode("a\U0001f9ff")[:-1]
    stream = TextStream(made(kind))
    assert "".join(map(stream.push, half)) == "a"
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_print_nothing(kind: str):
    tokenizer = made(kind)
    stream = TextStream(tokenizer)
    assert [stream.push(special.id) for special in tokenizer.specials] == [""] * len(tokenizer.specials)
    assert stream.finish() == ""


def test_typed_markers_print_as_text():
    tokenizer = Tokenizer.create("gpt2", template=TAGS)
    assert streamed(tokenizer, tokenizer.encode("<|end|>"))[0] == "<|end|>"


def test_only_what_may_begin_a_stop_string_is_held_back():
    stream = TextStream(made("char"), ("\nUser:",))
    pushed = [stream.push(id) for id in b"a\nUsb\n"]
    assert pushed == ["a", "", "", "", "\nUsb", ""]
    assert (stream.finish(), stream.stopped) == ("\n", None)


def test_a_stop_string_ends_the_text_for_good():
    stream = TextStream(made("gpt2"), ("User:", "\nUser:"))
    pushed = [stream.push(id) for id in made("gpt2").encode("Hello\nUser: more")]
    assert "".join(pushed) == "Hello"
    assert stream.stopped == "\nUser:"
    assert (stream.push(15496), stream.finish()) == ("", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="a stop string is empty and would stop every reply; remove it"):
        TextStream(made("char"), ("x", ""))
