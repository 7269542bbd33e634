"""Tokenizers of Hugging Face folders: transformers' ids, files written back with the same values, odd folders told."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import small_vocabularies as small
import transformers
from hostile_vocabularies import framed

from jaxgpt.chat import CHATML, PLAIN, TEMPLATES, Message, Template, paired_tags, render
from jaxgpt.errors import InputError
from jaxgpt.formats import hf_tokenizer
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies.kinds import gpt2_files

TEXTS = (
    small.PYTHON,
    "Hello world",
    " don't  stop\n\n\t",
    "naïve e\u0301 日本語 🙂",
    "1234 == x[5]\r\n",
    "a<MUL_2_3_6> <tool_call>b",
    "",
)
MARKED = "<|im_start|>user\nHi<|im_end|><|endoftext|>"


def read(folder: Path, rows: int = 768, eos_ids: tuple[int, ...] = ()) -> tuple[Tokenizer | None, list[str]]:
    notices: list[str] = []
    return hf_tokenizer.read(folder, rows, notices, eos_ids)[0], notices


def tokenizer_of(folder: Path, rows: int = 768) -> Tokenizer:
    tokenizer, notices = read(folder, rows)
    assert tokenizer is not None, notices
    return tokenizer


def written(tokenizer: Tokenizer, folder: Path, template: Template | None = None) -> Path:
    folder.mkdir(parents=True)
    assert hf_tokenizer.write(tokenizer, template, folder, 128) == []
    return folder


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def agrees(tokenizer: Tokenizer, other: Any) -> None:
    """transformers parses special tokens in text; both give the same ids and text."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert other.encode(text, add_special_tokens=False) == ids
        assert other.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    assert other.encode(MARKED, add_special_tokens=False) == tokenizer.encode(MARKED, specials=True)


def values(folder: Path) -> dict[str, Any]:
    """Every file by name, JSON as its value."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
    return {p.name: json.loads(p.read_text()) if p.suffix == ".json" else p.read_text() for p in paths}


# -- There and back --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["qwen2", "llama-bpe", "gpt-2", "smollm"])
def test_an_imported_tokenizer_has_transformers_ids_and_goes_back_with_the_same_values(tmp_path: Path, rule: str):
    folder = small.as_json(tmp_path / "in", rule, tokenizer_class="PreTrainedTokenizerFast", model_max_length=99)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}, indent=4))
    tokenizer = tokenizer_of(folder)
    assert (tokenizer.kind, tokenizer.pre_tokenizer) == ("hf", rule)
    agrees(tokenizer, theirs(folder))
    saved = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())), 768)
    out = written(saved, tmp_path / "out")
    assert values(folder).items() <= values(out).items()
    agrees(tokenizer, theirs(out))


QWEN2_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{{ message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_chat_template_comes_with_the_tokenizer_and_goes_back(tmp_path: Path):
    folder = small.as_json(
        tmp_path / "in", "qwen2", chat_template=QWEN2_CHAT, tokenizer_class="PreTrainedTokenizerFast"
    )
    notices: list[str] = []
    tokenizer, template = hf_tokenizer.read(folder, 768, notices)
    assert tokenizer is not None
    assert template is not None
    messages = [Message(role="user", content="Hi <|im_end|>"), Message(role="assistant", content="OK.")]
    rendered = render(messages, tokenizer, template)
    assert rendered.ids == render(messages, tokenizer, CHATML).ids
    assert [id for id in rendered.ids if id in tokenizer.special_ids] == [701, 702, 701, 702]
    out = tmp_path / "out"
    out.mkdir()
    hf_tokenizer.write(tokenizer, template, out, 128)
    assert values(folder).items() <= values(out).items()


@pytest.mark.parametrize("in_hex", [False, True])
def test_two_files_are_written_back_and_beside_them_a_tokenizer_json(tmp_path: Path, in_hex: bool):
    folder = small.as_two_files(tmp_path / "in", "qwen2", "Qwen2Tokenizer", in_hex=in_hex)
    tokenizer = tokenizer_of(folder)
    assert tokenizer.kind == ("hex" if in_hex else "bpe")
    out = written(tokenizer, tmp_path / "out")
    assert values(folder).items() <= values(out).items()
    agrees(tokenizer, transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json")))
    again = tokenizer_of(out)
    assert again.kind == "hf"
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


LARGE_AGAIN = (("gpt2", "tags"), ("gpt2", "plain"))
OWN = [
    # What a template changes is seen with the small vocabulary as well.
    pytest.param(kind, template, marks=[pytest.mark.exhaustive] if (kind, name) in LARGE_AGAIN else [])
    for kind in ("gpt2", "char")
    for name, template in TEMPLATES.items()
]


@pytest.mark.parametrize(("kind", "template"), OWN)
def test_jaxgpts_own_tokenizers_come_back_as_they_were(tmp_path: Path, kind: str, template: Template):
    corpus = "".join(map(chr, range(32, 127))) + "é日本語🙂\n"
    tokenizer = Tokenizer.create(kind, template=template, corpus=[corpus])
    folder = written(tokenizer, tmp_path / "out", template)
    notices: list[str] = []
    again, found = hf_tokenizer.read(folder, tokenizer.model_vocab_size, notices)
    assert again is not None
    assert (again.state(), found, notices) == (tokenizer.state(), template, [])
    other = theirs(folder)
    for text in TEXTS:
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert other.eos_token_id == tokenizer.special("end_of_text").id


def test_a_gpt2_of_the_hub_stays_kind_gpt2_and_keeps_its_files(tmp_path: Path):
    folder = written(Tokenizer.create("gpt2", template=PLAIN, model_vocab_size=50257), tmp_path / "in")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer = tokenizer_of(folder, 50257)
    assert tokenizer.kind == "gpt2"
    assert [(s.name, s.id) for s in tokenizer.specials] == [("end_of_text", 50256)]
    out = written(Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())), 50257), tmp_path / "out")
    assert values(out) == values(folder)


def test_a_gpt2_that_begins_every_text_with_a_token_keeps_it(tmp_path: Path):
    folder = written(Tokenizer.create("gpt2", template=PLAIN, model_vocab_size=50257), tmp_path / "in")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    framed(50256)(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = tokenizer_of(folder, 50304)
    assert (tokenizer.kind, tokenizer.bos_ids) == ("hf", (50256,))
    assert [*tokenizer.bos_ids, *tokenizer.encode("Hello world")] == theirs(folder)("Hello world").input_ids


SAID_BEFORE = {"add_prefix_space": True, "add_bos_token": True, "bos_token": "<|endoftext|>"}


@pytest.mark.parametrize("form", ["two files", "json", "generic class"])
@pytest.mark.parametrize(("rule", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2TokenizerFast")])
def test_what_the_settings_put_before_a_text_is_put_as_by_transformers(rule: str, name: str, form: str, tmp_path: Path):
    two_files = form == "two files"
    folder = small.as_two_files(tmp_path / "in", rule, name) if two_files else small.as_json(tmp_path / "in", rule)
    before = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    small.noted(
        folder, {**before, "tokenizer_class": "PreTrainedTokenizerFast" if "gen" in form else name, **SAID_BEFORE}
    )
    tokenizer, notices = read(folder)
    assert tokenizer
    out = written(tokenizer, tmp_path / "out")
    for text in ("hello world 12", "\n1", " x", small.PYTHON):
        expected = theirs(folder)(text).input_ids
        assert [*tokenizer.bos_ids, *tokenizer.encode(text)] == theirs(out)(text).input_ids == expected
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalise(text)
    by_json = "is ignored: tokenizer.json decides, in transformers too"
    assert any(f"add_bos_token true {by_json}" in line for line in notices) == (not two_files)
    assert any(f"add_prefix_space true {by_json}" in line for line in notices) == ("gen" in form)
    assert any("puts a space before a text (add_prefix_space), against tokenizer.json" in line for line in notices) == (
        form == "json"
    )


def test_gpt2_with_another_programs_tokens_is_imported_with_them(tmp_path: Path):
    folder = written(Tokenizer.create("gpt2", template=PLAIN, model_vocab_size=50257), tmp_path / "in")
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [
        {"id": 50257, "content": "<|user|>", "special": True, **flags},
        {"id": 50258, "content": "<MUL_2_3_6>", "special": False, **flags},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = tokenizer_of(folder, 50304)
    assert (tokenizer.kind, tokenizer.special("<|user|>").id, tokenizer.added) == (
        "gpt2",
        50257,
        {"<MUL_2_3_6>": 50258},
    )
    agrees(tokenizer, theirs(folder))
    assert tokenizer.encode("<|user|>x<MUL_2_3_6>")[-1] == 50258


def test_tokens_added_since_are_in_the_export(tmp_path: Path):
    tokenizer = tokenizer_of(small.as_json(tmp_path / "in", "qwen2")).with_added(["<DIV_6_3>"])
    tokenizer = tokenizer.with_template(paired_tags(end="<|im_end|>"))
    out = written(tokenizer, tmp_path / "out")
    again = tokenizer_of(out)
    assert again.added["<DIV_6_3>"] == tokenizer.added["<DIV_6_3>"] == 705
    assert [s.id for s in again.specials] == [s.id for s in tokenizer.specials]
    agrees(tokenizer, theirs(out))
    assert theirs(out).decode([705], skip_special_tokens=True) == "<DIV_6_3>"


# -- Domain tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_domain_tokens_are_one_id_wherever_they_occur_and_survive_skipping(kind: str):
    base = Tokenizer.create(kind, template=CHATML, corpus=["abc 123"])
    tokenizer = base.with_added(["<MUL_2_3_6>", "<MUL_2_3>", "<MUL_2_3_6>"])
    first, second = base.vocab_size, base.vocab_size + 1
    text = "abc <MUL_2_3_6><MUL_2_3> 123<|im_end|>"
    ids = tokenizer.encode(text)
    assert [id for id in ids if id >= first] == [first, second]
    assert tokenizer.decode(ids, skip_specials=True) == text
    assert [id for id in ids if id < first] == [*base.encode("abc "), *base.encode(" 123<|im_end|>")]
    loaded = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())), tokenizer.model_vocab_size)
    assert loaded.encode(text) == ids


def test_domain_tokens_ask_for_rows_only_where_there_are_none():
    base = Tokenizer.create("gpt2", template=CHATML)
    assert base.with_added(["<x>"]).model_vocab_size == 50304
    grown = base.with_added([f"<x{i}>" for i in range(60)])
    assert (grown.vocab_size, grown.model_vocab_size) == (50320, 50368)
    assert grown.specials == base.specials


@pytest.mark.parametrize("text", ["<|im_end|>", "<x>", "", "def", " the", "\u0120the"])
def test_a_domain_token_that_is_a_token_already_is_refused(text: str):
    tokenizer = Tokenizer.create("gpt2", template=CHATML).with_added(["<x>"])
    with pytest.raises(InputError, match=r"is token \d+ already; leave it out|is an empty string; give it one"):
        tokenizer.with_added([text])


# -- What is left out or refused -------------------------------------------------------


def test_more_tokens_than_rows_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"^tokenizer has 705 tokens, model embeds 704; give the tokenizer of this model"
    ):
        read(small.as_json(tmp_path, "qwen2"), 704)


def test_a_folder_without_a_vocabulary_has_no_tokenizer_and_says_so(tmp_path: Path):
    missing = "the folder has no vocabulary (tokenizer.json, or vocab.json and merges.txt)"
    assert read(tmp_path) == (None, [f"no tokenizer imported: {missing}; prompts must be token ids"])


def test_sentencepiece_is_left_out_and_said(tmp_path: Path):
    folder = small.as_json(tmp_path, "gpt-2")
    content = json.loads((folder / "tokenizer.json").read_text())
    content |= {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, notices = read(folder)
    assert tokenizer is None
    assert notices[0].startswith("no tokenizer imported: ")
    assert (
        "is no byte-level BPE (no ByteLevel pre-tokenizer), and jaxgpt decodes byte by byte; prompts must" in notices[0]
    )


def test_ends_come_from_the_model_where_the_tokenizer_names_none(tmp_path: Path):
    folder = small.as_json(tmp_path, "llama-bpe", eos_token=None, pad_token=None)
    tokenizer, _ = read(folder, eos_ids=(702,))
    assert tokenizer is not None
    assert {s.name: s.id for s in tokenizer.specials} == {"end_of_text": 700, "start": 701, "end": 702}


def test_a_vocabulary_that_ends_no_text_gets_a_token_where_there_is_a_row(tmp_path: Path):
    tmp_path.joinpath("tokenizer.json").write_text(small.trained("qwen2"))
    tokenizer, _ = read(tmp_path, 701)
    assert tokenizer is not None
    assert tokenizer.special("end_of_text").id == 700
    tokenizer, notices = read(tmp_path, 700)
    assert tokenizer is None
    assert "no token of it ends a text, and the model has no row for one" in notices[0]


def test_a_tokenizer_json_without_a_list_of_added_tokens_goes_in_and_out(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    content = json.loads(small.trained("qwen2"))
    del content["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    out = written(tokenizer_of(folder), tmp_path / "out")
    assert tokenizer_of(out).special("end_of_text").id == 700


def test_a_named_token_that_the_vocabulary_lacks_is_told(tmp_path: Path):
    _, notices = read(small.as_json(tmp_path, "qwen2", pad_token="[PAD]"))
    assert notices == ["tokenizer_config.json names [PAD], which the vocabulary lacks; ignored"]


def test_gpt2s_files_alone_are_gpt2(tmp_path: Path):
    for name, openai in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        (tmp_path / name).write_bytes(gpt2_files()[openai].read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = tokenizer_of(tmp_path, 50257)
    assert tokenizer.kind == "gpt2"
    assert [(s.name, s.id) for s in tokenizer.specials] == [("end_of_text", 50256)]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("thing", ["pipe", "folder", "link"])
def test_what_is_no_file_where_a_file_may_be_is_refused_and_never_opened(name: str, thing: str, tmp_path: Path):
    path = small.as_json(tmp_path / "in", "qwen2") / name
    path.unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("nowhere", path)}[thing]
    make(path)
    what = "a link to nothing" if thing == "link" else "a folder, pipe or device"
    with pytest.raises(InputError, match=re.escape(f"{name} is {what}, not a file; put the file there, or remove it")):
        read(tmp_path / "in")
