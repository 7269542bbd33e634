"""`add_prefix_space` and `add_bos_token` of tokenizer_config.json, as transformers' tokenizer classes read them.

Some classes make their steps anew beside a tokenizer.json, so that `add_prefix_space`
counts there, and is false where nothing is said; all others take the file as it is.
`add_bos_token` counts only without a tokenizer.json.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxgpt.errors import InputError
from jaxgpt.vocabularies import split_rules
from jaxgpt.vocabularies.bpe import ByteLevelEncoder, HfEncoder
from jaxgpt.vocabularies.kinds import END_OF_TEXT

SPACE, BOS = "add_prefix_space", "add_bos_token"
_CLASSES = {"GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "RobertaTokenizer"}
"""Those that make their steps anew."""
_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
}
"""Class by `model_type`, where no `tokenizer_class` is named."""
_END_BEGINS = {"GPT2Tokenizer", "GPTNeoXTokenizer"}
"""Classes whose bos is `<|endoftext|>` unless another is named."""


class ClassSettings:
    """What a folder's tokenizer_config.json says of the two keys."""

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any], bos: str | None) -> None:
        """Takes tokenizer_config.json, config.json and the string of `bos_token`; InputError where a key is no flag."""
        self._said = {key: settings[key] for key in (SPACE, BOS) if settings.get(key) is not None}
        for key, value in self._said.items():
            if not isinstance(value, bool):
                raise InputError(f"tokenizer_config.json: {key} is {str(value)[:20]!r}, expected true or false")
        self._class = _class(settings, config)
        self._bos = bos or (END_OF_TEXT if self._class in _END_BEGINS else None)

    def over_json(self, text: str, notices: list[str]) -> str:
        """The tokenizer.json as the folder's class uses it."""
        if self._class not in _CLASSES:
            return text
        content, asked = json.loads(text), self._said.get(SPACE, False)
        if not _prefix(content, asked):
            return text
        way = "puts a space" if asked else "puts no space"
        notices.append(
            f"tokenizer_config.json {way} before a text ({SPACE}), against tokenizer.json; "
            f"so it is done, as by transformers' {self._class}"
        )
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def over_two_files(self, encoder: ByteLevelEncoder) -> ByteLevelEncoder:
        """A vocabulary of vocab.json and merges.txt with what is put before a text: then a tokenizer.json of it."""
        bos = {**encoder.added, **encoder.specials}.get(self._bos or "") if self._said.get(BOS) else None
        if bos is None and not self._said.get(SPACE):
            return encoder
        content = json.loads(encoder.json())
        _prefix(content, self._said.get(SPACE, False))
        if self._bos is not None and bos is not None:
            content["post_processor"] = _beginning(self._bos, bos)
        return HfEncoder({"tokenizer.json": json.dumps(content, ensure_ascii=False, indent=2) + "\n", "added": []})

    def ignored(self, encoder: ByteLevelEncoder, why: str) -> list[str]:
        """Lines of what is said and not done."""
        done = {SPACE: encoder.prefixes_space, BOS: bool(encoder.bos_ids)}
        wrong = {key: value for key, value in self._said.items() if value != done[key]}
        return [f"tokenizer_config.json: {key} {json.dumps(value)} is ignored: {why}" for key, value in wrong.items()]


def _class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that AutoTokenizer chooses; empty where nothing says it."""
    named, model = settings.get("tokenizer_class"), config.get("model_type")
    # So many folders of Qwen2 name another class that transformers does not listen.
    if isinstance(named, str) and named and model != "qwen2":
        return named.removesuffix("Fast")
    return _OF_MODEL.get(model, "") if isinstance(model, str) else ""


def _prefix(content: Mapping[str, Any], asked: bool) -> bool:
    """Make the steps of a tokenizer.json put a space before a text, or none; whether that was a change."""
    steps: list[Any] = [step for step in split_rules.flat(content["pre_tokenizer"]) if step.get("type") == "ByteLevel"]
    changed = [step for step in steps if step.get(SPACE, True) != asked]
    for step in changed:
        step[SPACE] = asked
    return bool(changed)


def _beginning(bos: str, id: int) -> dict[str, Any]:
    """The section of tokenizer.json that puts a token before a text."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }
