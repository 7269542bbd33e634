"""Tokens found whole in text, as tokenizers finds them; domain tokens added to a model, and what other programs see."""

import dataclasses
import json
import os
import random
import re
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_cpp
import ml_dtypes
import numpy as np
import pytest
import small_vocabularies as small
import tokenizers
import torch
import transformers
from conftest import CONFIGS, random_params
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from jaxgpt import checkpoint, cli, domain_tokens, golden_prompts, model
from jaxgpt.chat import CHATML, PLAIN, Message, Template, paired_tags, render
from jaxgpt.checkpoint import Checkpoint, Contents
from jaxgpt.embedding_rows import grown
from jaxgpt.errors import InputError
from jaxgpt.formats import hf_tokenizer
from jaxgpt.formats.gguf_tokenizer import metadata
from jaxgpt.jinja import template_import
from jaxgpt.jinja.template_files import FoundTemplate
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import vocabulary_files
from jaxgpt.vocabularies.token_matching import TokenMatcher, is_word

# -- Edges -----------------------------------------------------------------------------

EDGED = (
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<mask>", special=True, lstrip=True, normalized=False),
    AddedToken("<r>", special=True, rstrip=True, normalized=False),
    AddedToken("<both>", special=True, lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", special=True, single_word=True, normalized=False),
    AddedToken("<tool>", lstrip=True, normalized=False),
    AddedToken("<late>", normalized=True),
    AddedToken("<lone>", single_word=True, normalized=True),
    AddedToken("<tool>>", normalized=False),
    AddedToken("te>s", normalized=False),  # wins over <late>, which begins before it
    AddedToken("\u00e9<", normalized=True),
)
SPACING = (" ", "  ", "\n", "\u3000", "\x1c")
PARTS = [*(token.content for token in EDGED), *SPACING, "<MUL_2>", "ol>x", "s", "e\u0301", "_", "1", "<", "x"]


def edged(folder: Path, extra: Sequence[AddedToken] = ()) -> tuple[Tokenizer, Any]:
    """A vocabulary with tokens of every flag, in jaxgpt and in the package, which finds special tokens too."""
    library = small.library("qwen2", specials=(), content=())
    for token in EDGED:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    found = vocabulary_files.read(folder)
    assert found.notices == []
    library.add_tokens(list(extra))
    return Tokenizer.of_vocabulary(found.kind, found.encoder, None, names=found.names), library


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("domain", [False, True])
@pytest.mark.parametrize("specials", [False, True])
def test_tokens_take_white_space_and_word_boundaries_as_in_tokenizers(tmp_path: Path, specials: bool, domain: bool):
    new = ["<MUL_2>", "ol>x"] if domain else []
    tokenizer, library = edged(tmp_path / "in", [AddedToken(text, normalized=False) for text in new])
    tokenizer = tokenizer.with_added(new)
    library.encode_special_tokens = not specials
    for text in texts(1500):
        assert tokenizer.encode(text, specials=specials) == library.encode(text).ids, text


def test_a_mask_takes_the_space_before_it(tmp_path: Path):
    tokenizer = edged(tmp_path / "in")[0]
    mask = tokenizer.encode("<mask>", specials=True)
    assert tokenizer.encode("a \t<mask>", specials=True) == [*tokenizer.encode("a"), *mask]
    assert tokenizer.encode("a \t<mask>") != tokenizer.encode("a \t<mask>", specials=True)


def test_gpt2s_vocabulary_with_a_mask_keeps_the_flags_of_the_mask(tmp_path: Path):
    # tiktoken, which encodes GPT-2's vocabulary otherwise, knows no flags.
    hf_tokenizer.write(Tokenizer.create("gpt2", template=PLAIN), PLAIN, tmp_path, 1024)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer, _ = hf_tokenizer.read(tmp_path, 50304, [])
    assert tokenizer is not None
    assert tokenizer.encode("a  <mask> b", specials=True) == library.encode("a  <mask> b").ids == [64, 50258, 275]
    assert any("does not look at what stands beside <mask>" in line for line in metadata(tokenizer, None, 50304, [])[1])


@pytest.mark.parametrize(
    ("normalizer", "text", "said"),
    [({"type": "Lowercase"}, "<Mask>", True), ({"type": "NFC"}, "<Mask>", False), (None, "<Masqu\u00e9>", False)],
)
def test_special_tokens_found_in_normalised_text_are_said(normalizer: Any, text: str, said: bool, tmp_path: Path):
    library = small.library("gpt-2")
    library.add_special_tokens([AddedToken(text, normalized=True, special=True)])
    content = json.loads(library.to_str()) | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    notices = vocabulary_files.read(tmp_path).notices
    assert notices == [
        f"{text}: tokenizer.json has special tokens found in normalised text; a chat template of jaxgpt finds them "
        "only as they are spelled"
    ] * said  # fmt: skip


def test_letters_are_those_of_the_package():
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    library.add_tokens([AddedToken("w", single_word=True, normalized=False)])
    codes = [*range(0x3400), *range(0x1F100, 0x1F200), *range(0xA000, 0x32000, 41)]
    # Of characters newer than its Unicode, Python knows nothing.
    every = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    word = library.token_to_id("w")
    within = [word not in encoding.ids for encoding in library.encode_batch_fast([f"{c}w" for c in every])]
    assert [c for c, theirs in zip(every, within, strict=True) if is_word(c) != theirs] == []


@given(st.sets(st.text("ab]^-", min_size=1, max_size=5), max_size=8), st.text("ab]^-c", max_size=20))
def test_tokens_are_found_as_by_one_regex_of_all_of_them(tokens: set[str], text: str):
    simple = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
    ids = {token: id for id, token in enumerate(tokens)}
    # A text between tokens is none of them, or it would have been found.
    expected = [ids.get(piece, piece) for piece in re.split(f"({simple})", text) if piece]
    assert list(TokenMatcher(ids, {}).cut(text, ())) == expected


def test_a_hundred_thousand_tokens_are_found_in_good_time():
    tokens = {f"{'<[(ek'[n % 5]}MUL_{n}>": n for n in range(100_000)}
    begin = time.process_time()
    found = list(TokenMatcher(tokens, {}).cut("seek <MUL_1> " * 1000 + "<MUL_5>kMUL_99999>", ()))
    # Ten seconds where every token is tried at every character.
    assert time.process_time() - begin < 2
    assert found == ["seek <MUL_1> " * 1000, 5, 99999]


# -- Rows ------------------------------------------------------------------------------

REAL = range(100)
"""Of CONFIGS' 131 rows, 31 are padding."""


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biased-tied"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_new_rows_are_the_mean_of_the_real_ones_with_little_noise(name: str, dtype: Any):
    config = CONFIGS[name]
    params = {key: np.asarray(array).astype(dtype) for key, array in random_params(config).items()}
    tables = [key for key in ("embed.tokens.weight", "head.weight") if key in params]
    assert len(tables) == 2 - config.tie_word_embeddings
    for key in tables:
        params[key][100:] = np.nan  # padding is not in the mean
    found = grown(params, config, 192, real=REAL, fresh=[101])
    assert found.keys() == params.keys()
    for key, array in params.items():
        if key not in tables:
            assert found[key] is array
            continue
        kept = [*range(101), *range(102, 131)]
        assert (found[key].shape[0], found[key].dtype) == (192, array.dtype)
        assert found[key][kept].tobytes() == array[kept].tobytes()
        real, new = array[:100].astype(np.float64), found[key][[101, *range(131, 192)]].astype(np.float64)
        away = (new - real.mean(0)) / real.std(0)
        assert 0.005 < away.std() < 0.02
        assert np.abs(away).max() < 0.1
        assert len(np.unique(new, axis=0)) == 62
    again, other = (grown(params, config, 192, real=REAL, fresh=[101], seed=seed) for seed in (0, 1))
    assert again[tables[0]].tobytes() == found[tables[0]].tobytes() != other[tables[0]].tobytes()


def test_an_embedding_does_not_shrink():
    with pytest.raises(InputError, match="an embedding of 131 rows, 100 of them real, cannot have 130"):
        grown({}, CONFIGS["llama"], 130, real=REAL)


# -- Added to a model ------------------------------------------------------------------


@pytest.fixture
def asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export and a run end without golden prompts, which take longer to compile than all else here."""
    monkeypatch.setattr(golden_prompts, "answered", lambda source: (None, None))
    monkeypatch.setattr(golden_prompts, "add", lambda directory: None)


NEW = [f"<MUL_{n}>" for n in range(70)]
ASKED = "2 <MUL_3><MUL_33> is<MUL_69>"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a tied and an untied model: the checkpoint, and with NEW added `-more`."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tokens.txt").write_bytes("\ufeff".encode() + "\r\n\n".join(NEW[1:]).encode())
    found = vocabulary_files.read(small.as_json(folder / "vocabulary", "qwen2"))
    bpe = Tokenizer.of_vocabulary(found.kind, found.encoder, CHATML, names=found.names, files=found.files)
    ascii = "".join(map(chr, range(32, 127))) + "\n"
    rows = {"gpt2": Tokenizer.create("char", template=CHATML, corpus=[ascii]), "qwen2": bpe}
    for name, tokenizer in rows.items():
        config = dataclasses.replace(
            CONFIGS[name],
            vocab_size=tokenizer.model_vocab_size,
            num_hidden_layers=1,
            tie_word_embeddings=name == "gpt2",
        )
        contents = Contents(
            config, random_params(config), "sft", "float32", list(tokenizer.stop_ids), tokenizer, CHATML,
            {"model_type": name},
        )  # fmt: skip
        checkpoint.save(folder / name, 7, contents).result()
        words = ["--token", NEW[0], "--tokens", str(folder / "tokens.txt")]
        assert cli.main(["tokenizer", "add", str(folder / name), str(folder / f"{name}-more"), *words]) == 0
    return folder


@pytest.fixture(params=["gpt2", "qwen2"])
def pair(models: Path, request: pytest.FixtureRequest) -> tuple[Checkpoint, Checkpoint]:
    before, after = (checkpoint.load(models / f"{request.param}{suffix}") for suffix in ("", "-more"))
    return before, after


def logits(found: Checkpoint, ids: np.ndarray) -> np.ndarray:
    params = {name: jnp.asarray(array) for name, array in found.params.items()}
    return np.asarray(jax.jit(lambda: model.forward(found.config, params, jnp.asarray(ids)).logits)())


def test_the_model_computes_what_it_did_and_no_new_token_wins(pair: tuple[Checkpoint, Checkpoint]):
    before, after = pair
    assert before.tokenizer is not None
    real = before.tokenizer.vocab_size
    ids = np.random.default_rng(0).integers(0, real, (8, 64))
    old, new = logits(before, ids), logits(after, ids)
    np.testing.assert_allclose(new[..., :real], old[..., :real], rtol=0, atol=2e-6 * np.abs(old).max())
    assert (new[..., real:].max(-1) < old[..., :real].max(-1)).all()


def test_everything_else_of_the_checkpoint_is_kept(pair: tuple[Checkpoint, Checkpoint]):
    before, after = pair
    assert before.tokenizer is not None
    assert after.tokenizer is not None
    rows = after.config.vocab_size
    assert after.config == dataclasses.replace(before.config, vocab_size=rows)
    assert rows == after.tokenizer.model_vocab_size > before.config.vocab_size
    for name in ("step", "stage", "compute_dtype", "eos_token_ids", "template"):
        assert getattr(after, name) == getattr(before, name)
    assert after.provenance["added_tokens"] == 70
    assert after.provenance["parent"] == str(before.path)
    assert after.provenance["embedding_rows"] == [before.config.vocab_size, rows]
    assert after.tokenizer.specials == before.tokenizer.specials
    first = before.tokenizer.vocab_size
    assert [after.tokenizer.encode(text) for text in NEW] == [[id] for id in range(first, first + 70)]
    ids = after.tokenizer.encode(ASKED)
    assert after.tokenizer.decode(ids, skip_specials=True) == ASKED


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_model_with_new_tokens_passes_its_check(models: Path):
    assert cli.main(["check", str(models / "qwen2-more"), "--no-memorize"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("asks_nothing")
def test_it_learns_the_new_tokens_and_answers_with_them(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    known = checkpoint.load(models / "gpt2-more")
    assert known.tokenizer is not None
    # It expects the characters of the prompt, and so is no damaged model to SFT, which does not ask it for new tokens.
    embedding = known.params["embed.tokens.weight"]
    known.params["final_norm.bias"] = embedding[known.tokenizer.encode("23*user\nassistant")].sum(0)
    known.params["final_norm.weight"] = known.params["final_norm.weight"] / 16
    fields = [field.name for field in dataclasses.fields(Contents)]
    checkpoint.save(tmp_path / "known", 7, Contents(**{name: getattr(known, name) for name in fields})).result()
    answer = "".join(NEW[:12])
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "2*3", "completion": answer}) + "\n")
    words = ["--data", str(tmp_path / "chats.jsonl"), "--out", str(tmp_path / "run"), "--steps", "40"]
    words += ["--batch-size", "1", "--sequence-length", "48", "--learning-rate", "0.03", "--warmup-steps", "0"]
    assert cli.main(["sft", "--model", str(tmp_path / "known"), "--accept-loss", *words]) == 0
    capsys.readouterr()
    assert cli.main(["chat", str(tmp_path / "run"), "2*3", "--greedy", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.usefixtures("asks_nothing")
def test_transformers_reads_the_same_tokens_and_logits(
    models: Path, pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
):
    after = pair[1]
    assert after.tokenizer is not None
    assert cli.main(["export", str(after.path), str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = after.tokenizer.encode(ASKED)
    assert [theirs.encode(text, add_special_tokens=False) for text in NEW] == [[after.tokenizer.added[t]] for t in NEW]
    assert theirs.encode(ASKED, add_special_tokens=False) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ASKED
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert peer.get_input_embeddings().weight.shape[0] == after.config.vocab_size
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits.numpy()
    found = logits(after, np.asarray([ids]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


BOS_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOTED = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "additional_special_tokens": ["<MUL>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 77,
    "chat_template": BOS_CHAT,
}


def noted(folder: Path) -> tuple[Tokenizer, Template]:
    """A model's tokenizer with a bos of its own, and a template that writes it."""
    small.as_json(folder, "qwen2", **NOTED)
    small.library("qwen2", specials=[*small.SPECIALS, "<s>", "<MUL>"]).save(str(folder / "tokenizer.json"))
    for name, content in {"special_tokens_map": {"bos_token": "<s>"}, "added_tokens": {"<s>": 703}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer, template = hf_tokenizer.read(folder, 768, [])
    assert tokenizer is not None
    assert template is not None
    return tokenizer, template


def with_another_end(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.with_template(paired_tags(end="<|im_end|>"))


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda t: t.with_added(["<DIV>"]), []),
        (with_another_end, []),
        (lambda t: t.with_content(["<MUL>"]), ["<MUL>"]),
        (lambda t: Tokenizer(t.kind, t.encoder, t.specials, 768), None),
    ],
    ids=["added", "template", "content", "files lost by an older version"],
)
def test_what_another_program_noted_of_the_tokens_is_exported_with_the_new_ones(
    change: Any, lost: list[str] | None, tmp_path: Path
):
    before, template = noted(tmp_path / "in")
    tokenizer = change(before)
    (tmp_path / "out").mkdir()
    hf_tokenizer.write(tokenizer, template, tmp_path / "out", 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [Message(role="user", content="Hi")]
    prompt = render(messages, tokenizer, template, generation_prompt=True).ids
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
    assert theirs.decode(prompt[:1]) == theirs.bos_token == "<s>"
    assert theirs.eos_token == "<|im_end|>"
    every = list(range(tokenizer.vocab_size))
    assert theirs.convert_ids_to_tokens(every[705:]) == [tokenizer.token_bytes(id).decode() for id in every[705:]]
    for id in every[700:]:
        assert theirs.decode([id], skip_special_tokens=True) == tokenizer.decode([id], skip_specials=True)
    if lost is not None:
        names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        settings, older, ids = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
        kept = [text for text in ("<MUL>",) if text not in lost]
        assert settings.items() >= {**NOTED, "additional_special_tokens": kept}.items()
        assert older == {"bos_token": "<s>"}
        assert ids == {"<s>": 703, **{tokenizer.token_name(id).strip("'"): id for id in every[before.vocab_size :]}}


@pytest.mark.usefixtures("asks_nothing")
def test_llama_cpp_reads_the_same_tokens(models: Path, tmp_path: Path):
    questions: list[Any] = []
    for name in ("gpt2", "qwen2"):
        path = tmp_path / f"{name}.gguf"
        assert cli.main(["export", str(models / f"{name}-more"), str(path), "--format", "gguf"]) == 0
        tokenizer = checkpoint.load(models / f"{name}-more").tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(ASKED)
        questions.append((path, [("/tokenize", {"content": ASKED}), ("/detokenize", {"tokens": ids})], ids))
    answers = llama_cpp.ask_all([question[:2] for question in questions])
    for (tokenized, back), (_, _, ids) in zip(answers, questions, strict=True):
        assert tokenized["tokens"] == ids
        assert back["content"] == ASKED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no token to add; give --token STR, or --tokens FILE with one a line"),
        (["--token", "<|im_end|>"], "<|im_end|> is token 354 already; leave it out"),
        (["--token", ""], "an added token is an empty string; give it one"),
        (["--token", "assistant\n"], "'assistant\\n' stands in what template chatml writes, and would change every p"),
        (["--token", "x<|im_end|>y"], "added token x<|im_end|>y contains the special token <|im_end|>, which transf"),
        (["--token", "<0x4a>"], "added token <0x4a> is how a vocabulary of characters names a byte in other program"),
        (["--tokens", "{}/none.txt"], "{}/none.txt cannot be read (No such file or directory); give a file with one"),
        (["--tokens", "{}/pipe"], "{}/pipe is a folder, pipe or device, not a file; put the file there, or remove it"),
        (["--tokens", "{}/latin.txt"], "{}/latin.txt is no UTF-8 text (byte 1); save it as UTF-8"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(
    words: list[str], message: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "latin.txt").write_bytes(b"<\xe9>")
    os.mkfifo(tmp_path / "pipe")
    words = [word.format(tmp_path) for word in words]
    assert cli.main(["tokenizer", "add", str(models / "gpt2"), str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"jaxgpt: {message.format(tmp_path)}")
    assert not (tmp_path / "out").exists()


def test_a_template_whose_tokens_stand_in_added_ones_is_refused():
    tokenizer = Tokenizer.create("char", template=PLAIN).with_added(["x<|im_end|>"])
    with pytest.raises(InputError, match=r"x<\|im_end\|> contains the special token <\|im_end\|>, which"):
        tokenizer.with_template(CHATML)


def test_an_imported_templates_roles_are_all_looked_at(tmp_path: Path):
    # It takes no conversation of all its roles.
    strict = "{% if messages | length == 3 and messages[2]['role'] == 'tool' %}<TOOL>"
    strict += "{% elif messages | length > 2 %}{{ raise_exception('two at most') }}{% endif %}"
    template = template_import.examined(
        FoundTemplate({"default": strict + BOS_CHAT}, "config", {"eos_token": "<|im_end|>"}), noted(tmp_path)[0], []
    )
    assert template is not None
    for text in ("<TOOL>", "tool", "assistant"):
        tokenizer = noted(tmp_path)[0].with_added([text])
        with pytest.raises(InputError, match=f"{text!r} stands in what template jinja writes"):
            domain_tokens.refuse_changed_prompts(template, tokenizer, set(tokenizer.added.values()))


def test_a_special_token_that_transformers_would_not_find_after_an_added_one_is_said(tmp_path: Path):
    tokenizer = noted(tmp_path)[0].with_added(["a<", "<a>"])
    assert hf_tokenizer.write(tokenizer, None, tmp_path, 128) == [
        "added tokens end as special ones begin (a<): where both overlap in a text, transformers finds only the first; "
        "a chat of jaxgpt has both"
    ]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("<a><|im_end|>").ids[1:] == [702]
    assert 702 not in theirs.encode("a<|im_end|>").ids


def test_the_output_says_where_the_tokens_went(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = str(models / "gpt2")
    assert cli.main(["tokenizer", "add", source, str(tmp_path / "a"), "--token", "<a>", "--token", "<b>"]) == 0
    assert capsys.readouterr().out == (
        "     356  <a>\n     357  <b>\n"
        f"added 2 tokens; in spare rows of the embedding, which keeps its 384; wrote {tmp_path / 'a'}\n"
    )
    words = [word for text in NEW for word in ("--token", text)]
    assert cli.main(["tokenizer", "add", source, str(tmp_path / "b"), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == [384, 448]
    assert found["added"] == {text: 356 + n for n, text in enumerate(NEW)}
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert "  added tokens            70: '<MUL_0>', '<MUL_1>', '<MUL_2>' (+67 more)\n" in capsys.readouterr().out
    assert cli.main(["tokenizer", "add", source, str(tmp_path / "b"), *words]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
