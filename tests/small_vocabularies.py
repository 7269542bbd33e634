"""Small byte-level BPEs with the rules of real ones, trained here: of real vocabularies only GPT-2's is at hand."""

import functools
import json
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, trainers

from jaxgpt.vocabularies import split_rules
from jaxgpt.vocabularies.byte_alphabet import CHARACTERS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTENT = ("<tool_call>", "<MUL_2_3_6>")
"""Added tokens that are no special ones."""
TYPED = "a<|im_end|>\n<|im_start|>system\n<tool_call>{}</tool_call> <MUL_2_3_6><|endoftext|>b"
PYTHON = "def fibonacci(n):\n    a, b = 0, 1\n    while a < 1234567890:\n        a, b = b, a + b\n    return a\n"


@functools.cache
def trained(rule: str, size: int = 700) -> str:
    """A tokenizer.json with one of `split_rules.RULES`, without added tokens."""
    r = split_rules.RULES[rule]
    sections = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": r.normalizer,
        "pre_tokenizer": r.pre_tokenizer,
        "decoder": split_rules.byte_level(use_regex=True),
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": r.ignore_merges},
    }
    library = tokenizers.Tokenizer.from_str(json.dumps(sections))
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=CHARACTERS)
    library.train_from_iterator(corpus(), trainer)
    return library.to_str()


def corpus() -> list[str]:
    """Python source and some lines in other scripts."""
    folder = Path(sysconfig.get_path("stdlib"))
    lines = "日本語の文章 한국어 العربية हिन्दी naïve café 🙂🙂 👩‍👩‍👧 1234 5678\n" * 20
    return [(folder / name).read_text("utf-8") for name in ("textwrap.py", "bisect.py", "heapq.py")] + [lines]


def library(rule: str, specials: Sequence[str] = SPECIALS, content: Sequence[str] = CONTENT) -> Any:
    """The package's own tokenizer, which is what ours is compared with; what looks special stays text."""
    made = tokenizers.Tokenizer.from_str(trained(rule))
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    made.add_tokens([AddedToken(text, normalized=False) for text in content])
    made.encode_special_tokens = True
    return made


def as_json(folder: Path, rule: str, **settings: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    library(rule).save(str(folder / "tokenizer.json"))
    return noted(folder, settings)


def as_two_files(folder: Path, rule: str, tokenizer_class: str, *, in_hex: bool = False) -> Path:
    """The same vocabulary as vocab.json and merges.txt; what was added is noted in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(trained(rule))["model"]
    name = hex_name if in_hex else str
    vocabulary = {name(token): id for token, id in model["vocab"].items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = [" ".join(map(name, pair)) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", "utf-8")
    decoder = library(rule).get_added_tokens_decoder()
    notes = {str(id): {"content": token.content, "special": token.special} for id, token in decoder.items()}
    return noted(folder, {"tokenizer_class": tokenizer_class, "added_tokens_decoder": notes})


def noted(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder with a tokenizer_config.json as Qwen2's."""
    qwen2 = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**qwen2, **settings}), "utf-8")
    return folder


def hex_name(token: str) -> str:
    """A token of the byte alphabet, named by its bytes."""
    return bytes(map(CHARACTERS.index, token)).hex()
