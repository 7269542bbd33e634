"""Chat templates in Hugging Face folders: found where transformers finds them, put back as they were."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small_vocabularies as small
import transformers
from jinja_families import CHATML, QWEN2, QWEN3

from jaxgpt.chat import Message, render
from jaxgpt.errors import InputError
from jaxgpt.formats import hf_tokenizer
from jaxgpt.jinja import template_files, template_import
from jaxgpt.jinja.template import JinjaTemplate
from jaxgpt.tokenizer import Tokenizer

TOKENS = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>", "pad_token": None}
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}\r\n"}]


def folder_with(folder: Path, config: Mapping[str, Any], files: Mapping[str, str]) -> Path:
    small.as_json(folder, "qwen2", tokenizer_class="PreTrainedTokenizerFast", **config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


PLACES = {
    "config": ({"chat_template": QWEN2}, {}),
    "list": ({"chat_template": NAMED}, {}),
    "file": ({}, {"chat_template.jinja": CHATML + "\r\n"}),
    "files": ({}, {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": "{{ documents }}"}),
    "both": ({"chat_template": QWEN2}, {"chat_template.jinja": CHATML}),
}


def read(folder: Path) -> tuple[Tokenizer, JinjaTemplate]:
    tokenizer, template = hf_tokenizer.read(folder, 768, [])
    assert tokenizer
    assert isinstance(template, JinjaTemplate)
    return tokenizer, template


def text_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jinja")}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_transformers_finds_them_and_go_back(place: str, tmp_path: Path):
    folder = folder_with(tmp_path / "in", *PLACES[place])
    tokenizer, template = read(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert template.source.replace("\r\n", "\n") == theirs.get_chat_template()
    assert template.variables == theirs.special_tokens_map
    out = tmp_path / "out"
    out.mkdir()
    hf_tokenizer.write(tokenizer, template, out, 128)
    assert text_files(out) == text_files(folder)
    before, after = (json.loads((f / "tokenizer_config.json").read_text()).get("chat_template") for f in (folder, out))
    assert after == (None if place == "both" else before)
    assert read(out)[1] == template


@pytest.mark.parametrize("source", [QWEN2, CHATML, QWEN3], ids=["qwen2", "chatml", "qwen3"])
def test_ids_of_a_conversation_are_those_of_transformers(source: str, tmp_path: Path):
    folder = folder_with(tmp_path, {"chat_template": source}, {})
    tokenizer, template = read(folder)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    turns = ("What is 5+7?", "12", " Repeat: é中🙂\n\n- 1234 x", "def f(n):\n    return n", "Thanks")
    messages = [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]
    for k, prompt in ((1, True), (2, False), (3, True), (4, False), (5, True)):
        told: Any = [dict(message) for message in messages[:k]]
        ids = theirs.apply_chat_template(told, add_generation_prompt=prompt, return_dict=False)
        assert render(messages[:k], tokenizer, template, generation_prompt=prompt).ids == ids


def test_variables_come_from_either_file(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**TOKENS, "eos_token": "old", "cls_token": "[CLS]"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "unk_token": None, "extra_special_tokens": {"image_token": "<image>"}})
    )
    found = template_files.find(tmp_path)
    assert found
    expected = {"bos_token": "<|im_start|>", "eos_token": "</s>", "cls_token": "[CLS]", "image_token": "<image>"}
    assert found.variables == expected


def test_a_folder_without_templates_has_none(tmp_path: Path):
    assert template_files.find(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert template_files.find(tmp_path) is None


def test_a_folder_is_not_searched_for_ever(tmp_path: Path):
    (tmp_path / "additional_chat_templates").mkdir()
    for number in range(40):
        (tmp_path / f"additional_chat_templates/{number}.jinja").write_text("x")
    with pytest.raises(InputError, match="or more than 32"):
        template_files.find(tmp_path)


def test_a_name_is_no_way_out_of_the_folder(tmp_path: Path):
    tokenizer, template = read(folder_with(tmp_path / "in", *PLACES["files"]))
    values = {**template.to_dict(), "sources": {"default": "x", "../../escaped": "y"}}
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"named '../../escaped', outside the folder; refused"):
        hf_tokenizer.write(tokenizer, JinjaTemplate.of_dict(values), tmp_path / "out", 128)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('I need tools') }}", "does not render a question: chat template refuses the conversation"),
        ("{{ tools[0].name }}", "does not render a question: chat template failed: None has no element 0"),
        ("Hello", "does not render a question: it leaves out what is said"),
    ],
)
def test_a_template_without_use_is_left_out_with_a_notice(source: str, told: str, tmp_path: Path):
    notices: list[str] = []
    folder = folder_with(tmp_path, {"chat_template": source}, {})
    tokenizer, template = hf_tokenizer.read(folder, 768, notices)
    assert tokenizer
    assert template is None
    assert told in notices[-1]


def test_templates_of_which_none_is_the_default_are_left_out_with_a_notice(tmp_path: Path):
    notices: list[str] = []
    folder = folder_with(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}, {})
    assert template_import.read_from(folder, read_tokenizer(folder), notices) is None
    assert notices == ["no chat template imported: none is named default, but rag"]


def test_a_pipe_among_further_templates_is_refused_and_never_opened(tmp_path: Path):
    folder = folder_with(tmp_path / "in", *PLACES["files"])
    os.mkfifo(folder / "additional_chat_templates" / "late.jinja")
    with pytest.raises(InputError, match=r"late\.jinja is a folder, pipe or device, not a file"):
        template_files.find(folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    tokenizer, _ = hf_tokenizer.read(folder, 768, [])
    assert tokenizer
    return tokenizer
