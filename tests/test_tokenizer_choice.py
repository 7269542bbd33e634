"""`data encode --tokenizer`: names, files and folders of other programs; a wrong reading is refused with its cause."""

import json
import re
from pathlib import Path

import pytest
import small_vocabularies as small

from jaxgpt import cli
from jaxgpt.chat import CHATML
from jaxgpt.data.shards import TokenShards
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer_choice import chosen
from jaxgpt.vocabularies.kinds import gpt2_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "fibonacci.py"
    path.write_text(small.PYTHON * 150)
    return path


def encode(source: Path, out: Path, *words: str | Path) -> int:
    return cli.main(["data", "encode", str(source), "--out", str(out), "--val-fraction", "0", *map(str, words)])


@pytest.mark.parametrize("form", ["folder", "file", "two files"])
def test_python_through_qwen2s_rule_encodes_with_single_digits_and_nothing_unknown(
    form: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = small.as_json(tmp_path / "q", "qwen2")
    if form == "two files":
        folder = small.as_two_files(tmp_path / "two", "qwen2", "Qwen2Tokenizer")
    path = folder / "tokenizer.json" if form == "file" else folder
    assert encode(source, tmp_path / "out", "--tokenizer", path) == 0
    assert "unknown 0.00%" in capsys.readouterr().out
    shards = TokenShards(tmp_path / "out")
    tokenizer = shards.tokenizer()
    ids = shards.read(0, shards.tokens).tolist()
    assert tokenizer.decode(ids[:-1]) == small.PYTHON * 150
    with_digits = {tokenizer.token_bytes(id) for id in ids if re.search(rb"[0-9]", tokenizer.token_bytes(id))}
    assert with_digits == {str(digit).encode() for digit in range(10)}
    assert {s.name: s.id for s in tokenizer.specials} == {"end_of_text": 700, "start": 701, "end": 702, "pad": 705}


def test_a_byte_level_vocabulary_read_as_hex_is_refused_with_its_cause(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = small.as_two_files(tmp_path / "two", "qwen2", "Qwen2Tokenizer")
    assert encode(source, tmp_path / "out", "--tokenizer", folder, "--tokenizer-kind", "hex") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tokens are unknown, expected at most 1%; likely cause: the vocabulary names " in said
    assert "so it is byte-level BPE read as hex: drop --tokenizer-kind hex; pass --accept to go on anyway" in said
    assert not (tmp_path / "out").exists()


def test_the_same_in_hex_names_is_read_without_being_told(source: Path, tmp_path: Path):
    folder = small.as_two_files(tmp_path / "hex", "qwen2", "Qwen2Tokenizer", in_hex=True)
    plain = small.as_two_files(tmp_path / "plain", "qwen2", "Qwen2Tokenizer")
    for name, path in {"a": folder, "b": plain}.items():
        assert encode(source, tmp_path / name, "--tokenizer", path) == 0
    a, b = TokenShards(tmp_path / "a"), TokenShards(tmp_path / "b")
    assert (a.tokenizer().kind, b.tokenizer().kind) == ("hex", "bpe")
    assert a.read(0, a.tokens).tolist() == b.read(0, b.tokens).tolist()


def test_gpt2s_files_are_kind_gpt2(tmp_path: Path):
    for name, openai in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        (tmp_path / name).write_bytes(gpt2_files()[openai].read_bytes())
    tokenizer, notices = chosen(str(tmp_path), CHATML)
    assert tokenizer.state() == Tokenizer.create("gpt2", template=CHATML).state()
    assert notices == ["text is cut into words by the rule gpt-2: no tokenizer_class or model_type says which"]


def test_names_and_paths_that_are_nothing_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"^--tokenizer gpt5 is neither gpt2 nor char nor a file or folder; give one"):
        chosen("gpt5", CHATML)
    with pytest.raises(InputError, match=r"^--tokenizer-kind hex is for files, got --tokenizer gpt2; drop one"):
        chosen("gpt2", CHATML, kind="hex")
    with pytest.raises(InputError, match=r"vocab\.json is missing or no file; give a folder with tokenizer\.json"):
        chosen(str(tmp_path), CHATML)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(InputError, match=r"is no byte-level BPE \(a Unigram model, no ByteLevel pre-tokenizer\)"):
        chosen(str(tmp_path), CHATML)
