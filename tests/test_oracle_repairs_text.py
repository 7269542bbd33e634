"""Mistakes of a text side, planted by hand, are named by the repair that undoes them."""

import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest

from jaxgpt import chat, checkpoint
from jaxgpt.chat import Message, Rendered
from jaxgpt.config import from_hf
from jaxgpt.formats import hf
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.weights import parameters
from oracle import diagnosis, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.rungs import ids
from oracle.text import Text

pytestmark = pytest.mark.slow

NO_MODEL = cast(Reference, None)
"""The rung looks at no model."""
CORPUS = "The quick brown fox jumps over the lazy dog. 0123456789\n"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A chat model of characters with paired tags, and its export."""
    place = tmp_path_factory.mktemp("text")
    config = from_hf({**models.MODELS["llama"], "vocab_size": 320, "num_hidden_layers": 1})
    tokenizer = Tokenizer.create("char", template=chat.TAGS, corpus=[CORPUS], model_vocab_size=config.vocab_size)
    params = {p.name: np.zeros(p.shape, np.float32) for p in parameters(config)}
    contents = checkpoint.Contents(config, params, "sft", "float32", list(tokenizer.stop_ids), tokenizer, chat.TAGS, {})
    checkpoint.save(place / "run", 0, contents).result()
    loaded = checkpoint.load(place / "run")
    folder = place / "hf"
    hf.write(loaded, folder)
    candidate = Candidate(config, params, "float32", text=Text.of(loaded), real_ids=tokenizer.vocab_size)
    return Comparison(candidate, NO_MODEL, folder, folder, noise.stored_calibration())


def named(comparison: Comparison, **fields: Any) -> list[tuple[str, bool]]:
    text = comparison.candidate.text
    assert text is not None
    candidate = dataclasses.replace(comparison.candidate, text=dataclasses.replace(text, **fields))
    report = diagnosis.bisect(dataclasses.replace(comparison, candidate=candidate), rungs=[ids.NAME])
    assert report.verdict == "fail"
    return [(cause.name, cause.proved) for cause in report.causes]


def true(comparison: Comparison) -> Text:
    assert comparison.candidate.text is not None
    return comparison.candidate.text


TEXTS: dict[str, Callable[[str], str]] = {
    "case of the text changed": str.lower,
    "text normalised": lambda text: unicodedata.normalize("NFKC", text),
    "text stripped": str.strip,
    "space put before the text": lambda text: " " + text,
    "line ends converted": lambda text: text.replace("\r\n", "\n"),
    "characters dropped": lambda text: "".join(c for c in text if ord(c) < 128),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_was_changed_before_encoding_is_named(comparison: Comparison, name: str):
    encode = true(comparison).encode
    assert named(comparison, encode=lambda text: encode(TEXTS[name](text))) == [(name, True)]


def test_a_change_that_no_repair_knows_is_unknown(comparison: Comparison):
    encode = true(comparison).encode
    assert named(comparison, encode=lambda text: encode(text.replace("e", "3")))[0] == ("unknown", False)


def test_decoding_id_by_id_is_named(comparison: Comparison):
    decode = true(comparison).decode
    found = named(comparison, decode=lambda given: "".join(decode([id]) for id in given))
    assert found[0] == ("ids decoded one by one", True)


Change = Callable[[Text, Rendered, Sequence[Message]], Rendered]
RENDERINGS: dict[str, Change] = {
    "BOS before the template": lambda text, made, _: Rendered(
        [text.specials["end_of_text"].id, *made.ids], [0, *made.mask]
    ),
    "turn not ended": lambda text, made, _: Rendered(
        *_without(made, text.specials["end"].id)  # of every turn
    ),
    "every token trained": lambda _, made, __: Rendered(made.ids, [1] * len(made.ids)),
    "no token trained": lambda _, made, __: Rendered(made.ids, [0] * len(made.ids)),
}


def _without(made: Rendered, end: int) -> tuple[list[int], list[int]]:
    kept = [(id, on) for id, on in zip(made.ids, made.mask, strict=True) if id != end]
    return [id for id, _ in kept], [on for _, on in kept]


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_conversation_rendered_wrong_is_named(comparison: Comparison, name: str):
    render = true(comparison).render

    def wrong(now: Text, messages: Sequence[Message]) -> Rendered:
        return RENDERINGS[name](now, render(now, messages), messages)

    assert named(comparison, render=wrong)[0] == (name, True)


def _in_turns(extra: Callable[[str, list[int]], list[int]]) -> Callable[[Comparison], Callable[..., Rendered]]:
    """A renderer that trains more of some roles' turns: a function of role and a turn's mask."""

    def made(comparison: Comparison) -> Callable[..., Rendered]:
        render = true(comparison).render

        def wrong(now: Text, messages: Sequence[Message]) -> Rendered:
            turns = [(m["role"], render(now, [m])) for m in messages]
            ids = [id for _, turn in turns for id in turn.ids]
            return Rendered(ids, [on for role, turn in turns for on in extra(role, turn.mask)])

        return wrong

    return made


MASKS = {
    "header": (
        _in_turns(lambda role, mask: [1, *mask[1:]] if role == "assistant" else mask),
        "header of a reply trained",
    ),
    "headers of prompts": (
        _in_turns(lambda role, mask: [1, *mask[1:]] if role == "user" else mask),
        "template tokens trained",
    ),
    "ends of prompts": (
        _in_turns(lambda role, mask: [*mask[:-1], 1] if role == "user" else mask),
        "template tokens trained",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_trained_part_of_the_template_is_named_and_nothing_is_left(comparison: Comparison, name: str):
    plant, expected = MASKS[name]
    assert named(comparison, render=plant(comparison)) == [(expected, True)]


def test_a_trained_token_of_a_prompt_is_no_part_of_the_template(comparison: Comparison):
    plant = _in_turns(lambda role, mask: [*mask[:-2], 1, mask[-1]] if role == "user" and len(mask) > 8 else mask)
    assert named(comparison, render=plant(comparison))[0] == ("unknown", False)


def test_swapped_roles_are_named(comparison: Comparison):
    render = true(comparison).render
    other = {"user": "assistant", "assistant": "user", "system": "system"}

    def wrong(now: Text, messages: Sequence[Message]) -> Rendered:
        return render(now, [Message(role=other[m["role"]], content=m["content"]) for m in messages])

    assert named(comparison, render=wrong)[0] == ("roles swapped", True)


def test_an_empty_prompt_without_a_first_token_is_named(comparison: Comparison):
    prompt = true(comparison).prompt
    found = named(comparison, prompt=lambda now, text: prompt(now, text) if text else [])
    assert found == [("empty prompt without a first token", True)]


def test_a_stop_id_too_many_is_named(comparison: Comparison):
    stops = (*true(comparison).stop_ids, 99)
    assert named(comparison, stop_ids=stops) == [("stop id too many", True)]


def test_a_special_token_that_swallows_spaces_is_named(comparison: Comparison):
    parse, strings = true(comparison).parse, [special.text for special in true(comparison).specials.values()]

    def wrong(now: Text, text: str) -> list[int]:
        for string in strings:
            while f"{string} " in text:
                text = text.replace(f"{string} ", string)
        return parse(now, text)

    assert named(comparison, parse=wrong) == [("special token swallows spaces", True)]
