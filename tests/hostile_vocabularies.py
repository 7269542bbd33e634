"""tokenizer.json and chat templates that lie, loop or explode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_vocabularies as small

from jaxgpt.vocabularies import split_rules


def changed(change: Callable[[dict[str, Any]], object], folder: Path) -> Path:
    small.as_json(folder, "gpt-2")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def added(**note: Any) -> Callable[[dict[str, Any]], object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda content: content["added_tokens"].append({**flags, **note})


def split(pattern: str) -> Callable[[dict[str, Any]], object]:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
    steps.append(split_rules.byte_level(use_regex=False))
    return lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})


def framed(id: int) -> Callable[[dict[str, Any]], object]:
    """With a post-processor, as Llama 3's, that puts a token before every text."""
    section = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [id], "tokens": ["<|endoftext|>"]}},
    }
    return lambda content: content.update(post_processor=section)


def blown_up(content: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 9}


def lost_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["ÿÿ"] = content["model"]["vocab"].pop("ÿ")


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a regex bomb": (split(r"(x+x+)+y"), "is refused: Onig: Regex search error: retry-limit-in-match over"),
    "a bomb that waits": (split(r"(a|a)*b"), "is refused: Onig: Regex search error: retry-limit-in-match over"),
    "no regex": (split("("), "is refused: Oniguruma error: end pattern with unmatched parenthesis"),
    "a normalizer that blows up": (blown_up, "is refused: it needs far more memory than its size"),
    "a special on an ordinary id": (added(id=5, content="<x>"), "<x> has id 5, already '&'"),
    "an id after a hole": (added(id=800, content="<x>"), "<x> has id 800, but tokenizers counts it 705: ids before it"),
    "an id that is no number": (added(id="7", content="<x>"), "is refused: invalid type: string "),
    "two tokens with one id": (lambda c: c["model"]["vocab"].update(b=c["model"]["vocab"]["a"]), "already"),
    "an absurd id": (lambda c: c["model"]["vocab"].update(zz=4_000_000_000), "has id 4000000000; expected an integer"),
    "a negative id": (lambda c: c["model"]["vocab"].update(zz=-1), "is refused: "),
    "a text begun with nothing": (framed(1_000_000), "tokenizer.json puts id 1000000 before a text, which is no token"),
    "a lost byte": (
        lost_byte,
        "tokenizer.json lacks 1 of the 256 byte tokens",
    ),
    "a merge of nothing": (lambda c: c["model"]["merges"].append(["nope", "nope"]), "is refused: Token `nope` out of"),
    "no model": (lambda c: c.pop("model"), "has no model with a vocabulary"),
    "a number for sections": (lambda c: c.update(added_tokens=7), "is refused: invalid type: integer"),
}


RAW: dict[str, tuple[bytes, str]] = {
    "truncated": (b'{"version": "1.0", "model": {"vocab"', "is not readable JSON"),
    "nothing": (b"", "is not readable JSON"),
    "no text": (b"\xff\xfe\x00", "is no UTF-8 text (byte 0)"),
    "a list": (b"[1]", "is not a JSON object"),
    "brackets": (b"[" * 200_000, "is not readable JSON"),
    "a number of 5,000 digits": (b'{"model": ' + b"9" * 5000 + b"}", "is not readable JSON"),
}


BAD: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("chat_template.jinja", b"\xff\xfe", "is not readable as UTF-8 text"),
    "huge": ("chat_template.jinja", b"x" * (2 << 20), "longer than 1,048,576 characters"),
    "number": ("tokenizer_config.json", b'{"chat_template": 3}', "must be a string or a list"),
    "numbers": ("tokenizer_config.json", b'{"chat_template": [3]}', "a list of templates with different names"),
    "same names": (
        "tokenizer_config.json",
        b'{"chat_template": [{"name": "default", "template": ""}, {"name": "default", "template": "x"}]}',
        "a list of templates with different names",
    ),
    "no text": ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "objects with name and template"),
    "no JSON": ("tokenizer_config.json", b"{", "is not readable JSON"),
    "nested": ("tokenizer_config.json", b"[" * 100_000, "is not readable JSON"),
    "no object": ("tokenizer_config.json", b"[]", "is not a JSON object"),
}


HARMFUL = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "did not finish in 1 s",
    "{{ messages.__class__.__mro__ }}": "used a forbidden attribute",
    "{% if messages|length > 2 %}{{ ''.__class__.__mro__ }}{% endif %}{{ messages[0].content }}": "forbidden attribute",
    "{{ 'a' * 10**9 }}": "needed more than 400 MiB",
    "{% for": "is not valid Jinja: line 1",
}
