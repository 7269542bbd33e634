"""How byte-level BPE cuts text into words before it joins bytes: the rules of known vocabularies.

A rule goes by llama.cpp's name of it, and is written in the terms of tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LETTERS_AND_REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = _LETTERS_AND_REST.format(digits=r"\p{N}")
"""Digits one by one, as in Qwen2's tokenizer.json."""
LLAMA3_PATTERN = _LETTERS_AND_REST.format(digits=r"\p{N}{1,3}")
"""Digits by up to three, as in Llama 3's."""


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The step that spells text in the byte alphabet; with `use_regex` it first cuts as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class Rule:
    """What comes before the merges, as sections of tokenizer.json."""

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges would make of it."""


RULES: dict[str, Rule] = {
    "gpt-2": Rule(byte_level(use_regex=True)),
    "qwen2": Rule(_sequence(_split(QWEN2_PATTERN), byte_level(use_regex=False)), normalizer={"type": "NFC"}),
    "llama-bpe": Rule(_sequence(_split(LLAMA3_PATTERN), byte_level(use_regex=False)), ignore_merges=True),
    "smollm": Rule(_sequence({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True))),
}

_OF_CLASS = {"gpt2": "gpt-2", "roberta": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}


def rule_of(name: str) -> str | None:
    """Key of RULES for a `tokenizer_class` or `model_type` of transformers; None where it tells nothing."""
    return _OF_CLASS.get(name.lower().removesuffix("fast").removesuffix("tokenizer"))


def rule_named(pre_tokenizer: Any) -> str:
    """Key of RULES whose cuts are those of a section `pre_tokenizer`; empty for any other."""
    steps = [_essence(step) for step in flat(pre_tokenizer)]
    for name, rule in RULES.items():
        if steps == [_essence(step) for step in flat(rule.pre_tokenizer)]:
            return name
    return ""


def flat(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """The steps of a section `pre_tokenizer`, sequences opened; empty for what is none."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    steps = pre_tokenizer.get("pretokenizers")
    return [inner for step in steps for inner in flat(step)] if isinstance(steps, list) else []


def _essence(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what moves no cut."""
    defaults = {"use_regex": True, "add_prefix_space": True} if step.get("type") == "ByteLevel" else {}
    return {key: value for key, value in {**defaults, **step}.items() if key != "trim_offsets"}
