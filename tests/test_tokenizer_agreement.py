"""jaxgpt's tokenizers agree with tokenizers, tiktoken and transformers on 2,000 generated strings; 100,000 by hand."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parent.parent / "scripts" / "tokenizer_agreement.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizer_agreement", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module's names.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_generated_strings_have_the_same_ids_everywhere(
    count: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--count", str(count), "--seed", "4"])
    status = script.main()
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (status, set(result["differences"].values())) == (0, {0}), said.err
    assert {name.partition(",")[0] for name in result["differences"]} == {"hf", "bpe", "hex", "gpt2"}
    assert result["strings"] == count


def test_a_difference_would_be_seen(script: ModuleType, tmp_path: Path):
    folder = tmp_path / "v"
    folder.mkdir()
    made = script.trained(script.QWEN2, nfc=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    # The wrong rule: no bracket before a word, and no NFC.
    one = script.case("wrong", folder, script.in_tiktoken(made, script.GPT2, False))
    script.compare(one, ["plain", "f(self)", "e\u0301"])
    assert len(one.differences) == 2
    assert all(difference.startswith("wrong, tiktoken: ") for difference in one.differences)


def test_generated_strings_reach_every_kind_of_text(script: ModuleType):
    texts = list(script.strings(4000, 0))
    every = set("".join(texts))
    assert len({ord(character) // 128 for character in every}) > 300
    assert {"\u200d", "\x00", "\u3000", "\U0010ffff", "\u0301"} <= every
    assert sum("<|im_end|>" in text for text in texts) > 100
    assert texts == list(script.strings(4000, 0))
