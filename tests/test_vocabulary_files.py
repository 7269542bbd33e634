"""Vocabularies of other programs: the ids of the tokenizers library, the kind by content, nothing hostile loaded."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_vocabularies as small
from hostile_vocabularies import changed, framed, split
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.chat import CHATML
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import bpe, split_rules, tokenizer_probe, vocabulary_files
from jaxgpt.vocabularies.kinds import gpt2_files

RULES = tuple(split_rules.RULES)
CLASS = {"gpt-2": "GPT2Tokenizer", "qwen2": "Qwen2TokenizerFast", "llama-bpe": "LlamaTokenizerFast"}
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    st.sampled_from("ab1'.\n\t\r \xa0\u2003\u0301é中🙂<|>")
)
HARD = (
    small.PYTHON,
    small.TYPED,
    "  x\n\n\n   y \r\n\t",
    "e\u0301 \u212b ﬁ Ⅷ",
    "12345 ١٢٣",
    "\x00\x1c\x85\u2028",
    "",
    " " * 300 + "x" * 300,
)


def made(folder: Path, kind: Any = None, rows: int | None = None) -> Tokenizer:
    found = vocabulary_files.read(folder, kind=kind)
    return Tokenizer.of_vocabulary(found.kind, found.encoder, None, rows, names=found.names, files=found.files)


@pytest.fixture(scope="module", params=RULES)
def rule(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(rule: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(small.as_json(tmp_path_factory.mktemp("json"), rule))


@pytest.fixture(scope="module")
def theirs(rule: str) -> Any:
    return small.library(rule)


# -- Kind hf ---------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(text=TEXT)
def test_ids_are_those_of_the_library(text: str, tokenizer: Tokenizer, theirs: Any):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == tokenizer.normalise(text)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_have_the_librarys_ids_and_come_back(text: str, tokenizer: Tokenizer, theirs: Any):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == tokenizer.normalise(text)


def test_only_qwen2_normalises(rule: str, tokenizer: Tokenizer):
    assert tokenizer.normalise("e\u0301") == ("é" if rule == "qwen2" else "e\u0301")
    assert tokenizer.pre_tokenizer == rule


def test_what_people_type_never_becomes_a_special_token(tokenizer: Tokenizer):
    ids = tokenizer.encode(small.TYPED)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids, skip_specials=True) == small.TYPED
    parsed = tokenizer.encode(small.TYPED, specials=True)
    assert [id for id in parsed if id in tokenizer.special_ids] == [702, 701, 700]


def test_domain_tokens_of_the_file_are_content_with_their_own_ids(tokenizer: Tokenizer):
    assert tokenizer.added == {"<tool_call>": 703, "<MUL_2_3_6>": 704}
    ids = tokenizer.encode("x<MUL_2_3_6>y")
    assert ids.count(704) == 1
    assert tokenizer.decode(ids, skip_specials=True) == "x<MUL_2_3_6>y"


def test_state_restores_a_library_tokenizer(tokenizer: Tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    loaded = Tokenizer.from_state(state, tokenizer.model_vocab_size)
    assert loaded.state() == tokenizer.state()
    assert loaded.specials == tokenizer.specials
    for text in HARD:
        assert loaded.encode(text, specials=True) == tokenizer.encode(text, specials=True)
    assert loaded.merges == tokenizer.merges


def test_merges_are_the_files(rule: str, tokenizer: Tokenizer):
    model = json.loads(small.trained(rule))["model"]
    assert [a + b for a, b in tokenizer.merges] == [tokenizer.token_bytes(id) for id in range(256, len(model["vocab"]))]


def test_every_token_has_the_librarys_bytes(tokenizer: Tokenizer, theirs: Any):
    for id in range(tokenizer.base_vocab_size):
        assert tokenizer.decode([id]) == theirs.decode([id], skip_special_tokens=False)


def test_roles_of_special_tokens_come_from_the_files_beside(tmp_path: Path):
    tokenizer = made(small.as_json(tmp_path, "qwen2"))
    roles = {special.name: special.text for special in tokenizer.specials}
    assert roles == {"end_of_text": "<|endoftext|>", "start": "<|im_start|>", "end": "<|im_end|>"}
    assert (tokenizer.stop_ids, tokenizer.pad_id) == ((700, 702), 700)


def test_a_template_finds_its_tokens_in_the_vocabulary_and_adds_only_what_lacks(tmp_path: Path):
    found = vocabulary_files.read(small.as_json(tmp_path, "qwen2"))
    tokenizer = Tokenizer.of_vocabulary("hf", found.encoder, CHATML, names=found.names)
    assert {s.name: s.id for s in tokenizer.specials} == {"end_of_text": 700, "start": 701, "end": 702, "pad": 705}


def test_a_bos_of_the_post_processor_is_told_and_not_encoded(tmp_path: Path):
    folder = changed(framed(700), tmp_path)
    found = vocabulary_files.read(folder)
    assert found.encoder.bos_ids == (700,)
    assert any(notice.startswith("tokenizer.json puts <|endoftext|> before a text") for notice in found.notices)
    assert 700 not in found.encoder.encode_ordinary("a")


def test_a_bos_that_cannot_be_put_is_told(tmp_path: Path):
    folder = small.as_two_files(tmp_path, "qwen2", "Qwen2Tokenizer")
    small.noted(folder, {"add_bos_token": True})
    notices = vocabulary_files.read(folder).notices
    assert "tokenizer_config.json: add_bos_token true is ignored: no bos_token is in the vocabulary" in notices


# -- Kinds bpe and hex -----------------------------------------------------------------


@pytest.mark.parametrize("rule", CLASS)
@pytest.mark.parametrize("in_hex", [False, True])
def test_two_files_give_the_ids_of_tokenizer_json(tmp_path: Path, rule: str, in_hex: bool):
    one = made(small.as_json(tmp_path / "one", rule))
    folder = small.as_two_files(tmp_path / "two", rule, CLASS[rule], in_hex=in_hex)
    found = vocabulary_files.read(folder)
    assert found.kind == ("hex" if in_hex else "bpe")
    assert (
        f"text is cut into words by the rule {rule}, as tokenizer_config.json: tokenizer_class {CLASS[rule]} says"
        in (found.notices)
    )
    two = made(folder)
    assert [(s.name, s.text, s.id) for s in two.specials] == [(s.name, s.text, s.id) for s in one.specials]
    assert (two.added, two.merges, two.pre_tokenizer) == (one.added, one.merges, one.pre_tokenizer)
    for text in HARD:
        assert two.encode(text) == one.encode(text)
        assert two.encode(text, specials=True) == one.encode(text, specials=True)
    assert [two.token_bytes(id) for id in range(705)] == [one.token_bytes(id) for id in range(705)]
    loaded = Tokenizer.from_state(json.loads(json.dumps(two.state())), two.model_vocab_size)
    assert loaded.encode(small.TYPED) == one.encode(small.TYPED)


def test_the_rule_may_come_from_the_model_type(tmp_path: Path):
    folder = small.as_two_files(tmp_path, "qwen2", "PreTrainedTokenizerFast")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    found = vocabulary_files.read(folder)
    assert found.notices == ["text is cut into words by the rule qwen2, as config.json: model_type qwen2 says"]
    (folder / "config.json").unlink()
    notices = vocabulary_files.read(folder).notices
    assert notices == ["text is cut into words by the rule gpt-2: no tokenizer_class or model_type says which"]


def test_gpt2s_own_files_read_as_bpe_give_tiktokens_ids(tmp_path: Path):
    (tmp_path / "vocab.json").write_bytes(gpt2_files()["encoder.json"].read_bytes())
    (tmp_path / "merges.txt").write_bytes(gpt2_files()["vocab.bpe"].read_bytes())
    found = vocabulary_files.read(tmp_path)
    ours = Tokenizer.create("gpt2", template=CHATML)
    assert found.kind == "bpe"
    for text in HARD:
        assert found.encoder.encode_ordinary(text) == ours.encode(text)
    assert found.encoder.merges == ours.merges


def test_the_kind_is_told_by_content_and_tokenizer_json_wins(tmp_path: Path):
    both = small.as_two_files(small.as_json(tmp_path / "both", "qwen2"), "gpt-2", "GPT2Tokenizer")
    assert vocabulary_files.read(both).kind == "hf"
    assert vocabulary_files.read(both / "tokenizer.json").encoder.pre_tokenizer == "qwen2"
    assert bpe.names_of(json.loads(gpt2_files()["encoder.json"].read_text())) == (136, 256)


def test_what_is_neither_byte_level_nor_hex_is_refused(tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps({f"▁word{i}": i for i in range(500)}))
    (tmp_path / "merges.txt").write_text("a b\n")
    assert refusal(tmp_path) == (
        "vocab.json is neither byte-level BPE (it has 0 of 256 byte tokens) nor hex (0 of `00`…`ff`); "
        "at least 200 are expected"
    )


def test_python_through_qwen2s_rule_has_single_digits_and_nothing_unknown(tmp_path: Path):
    tokenizer = made(small.as_json(tmp_path, "qwen2"))
    tokens = [tokenizer.token_bytes(id).decode() for id in tokenizer.encode(small.PYTHON)]
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("011234567890")
    assert not set(tokenizer.encode(small.PYTHON)) & set(tokenizer.unknown_ids)


def test_a_byte_level_vocabulary_read_as_hex_is_almost_all_unknown_and_says_why(tmp_path: Path):
    tokenizer = made(small.as_json(tmp_path, "qwen2"), "hex")
    ids = tokenizer.encode(small.PYTHON)
    assert sum(id in tokenizer.unknown_ids for id in ids) / len(ids) > 0.9
    assert tokenizer.unknown_cause.endswith("so it is byte-level BPE read as hex: drop --tokenizer-kind hex")


# -- Refused ---------------------------------------------------------------------------


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        vocabulary_files.read(path, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (lambda c: c["model"].update(type="WordPiece"), "is no byte-level BPE (a WordPiece model)"),
    "sentencepiece": (
        lambda c: (c["model"].update(byte_fallback=True), c.update(pre_tokenizer=None, decoder={"type": "Fuse"})),
        "is no byte-level BPE (byte_fallback, no ByteLevel pre-tokenizer, a decoder that is not ByteLevel), and",
    ),
    "chance": (lambda c: c["model"].update(dropout=0.5), "is no byte-level BPE (dropout)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_tokenizer_of_another_sort_says_what_it_is(case: str, tmp_path: Path):
    change, message = OTHERS[case]
    assert message in refusal(changed(change, tmp_path))


def test_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary_files, "MAX_BYTES", 1000)
    assert "bytes; a vocabulary has at most 1,000" in refusal(small.as_json(tmp_path, "gpt-2"))


_UNSEEN = itertools.count()


def unseen(folder: Path) -> Path:
    """A folder whose tokenizer.json has bytes that this process has not read before."""
    with (small.as_json(folder, "gpt-2") / "tokenizer.json").open("a") as file:
        file.write(f"\n{' ' * next(_UNSEEN)}\n")
    return folder


def test_a_tokenizer_that_computes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_probe, "WALL_SECONDS", 0.001)
    assert "is refused: it did not load and encode a few lines in 0.001 s" in refusal(unseen(tmp_path))


def test_what_was_let_through_is_not_tried_again_and_what_was_refused_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = unseen(tmp_path / "one")
    same = shutil.copytree(folder, tmp_path / "same")
    verdicts = ["too slow", "", "too slow as well"]
    monkeypatch.setattr(tokenizer_probe, "_tried", lambda _: verdicts.pop(0))
    assert "is refused: too slow" in refusal(folder)
    made(folder)
    made(same)
    assert "is refused: too slow as well" in refusal(unseen(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json is not an object from tokens to ids"),
        ("vocab.json", '{"a": "b"}', "token 'a' has id b; expected an integer from 0 to 4,194,303"),
        ("vocab.json", '{"a": 1, "b": 1}', "b has id 1, already 'a'"),
        ("merges.txt", "#version: 0.2\na\n", "line 2 of the merges is 'a', expected a pair of byte-level tokens"),
        ("merges.txt", "a ÿz\n", "merges.txt cannot be read by tokenizers: "),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "does not note its added tokens as transformers"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token is '1', expected true or false"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "tokenizer_config.json is not readable JSON"),
        ("added_tokens.json", '{"<x>": null}', "added token <x> has id 'None'; expected an integer"),
        ("added_tokens.json", '{"<x>": 5}', "<x> has id 5, already '&'"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str):
    folder = small.as_two_files(tmp_path, "gpt-2", "GPT2Tokenizer")
    (folder / name).write_text(content)
    assert message in refusal(folder)


def test_a_missing_file_is_named(tmp_path: Path):
    assert "vocab.json is missing or no file; give a folder with tokenizer.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "config.json"])
def test_a_pipe_is_refused_and_never_opened(name: str, tmp_path: Path):
    folder = small.as_two_files(tmp_path, "gpt-2", "GPT2Tokenizer")
    os.mkfifo(folder / name)
    assert f"{name} is a folder, pipe or device, not a file; put the file there, or remove it" in refusal(folder)


def test_a_pattern_that_gives_up_is_an_error_and_not_a_panic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_probe, "bounded", lambda path: "")
    tokenizer = made(changed(split(r"(x+x+)+y"), tmp_path))
    with pytest.raises(InputError, match="the text cannot be encoded: Onig: Regex search error: retry-limit"):
        tokenizer.encode("x" * 40)


def test_white_space_without_end_is_refused_before_the_engine_gives_up(tmp_path: Path):
    tokenizer = made(small.as_json(tmp_path, "qwen2"))
    with pytest.raises(InputError, match=r"the text has 2,500,000 or more white space characters in a row; cut it"):
        tokenizer.encode("x" + " " * 5_100_000 + "y")


@pytest.mark.parametrize("unit", [" ", "\n", "a", "\u3000", "é"])
def test_long_runs_encode_and_come_back(unit: str, tokenizer: Tokenizer):
    text = "x" + unit * 200_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text
