"""The benchmark scripts run, and end with one JSON line that says what was measured."""

import dataclasses
import json
from types import ModuleType

import bench_decode
import bench_train
import fuzz_formats
import pytest

from jaxgpt.presets import PRESETS

pytestmark = pytest.mark.slow


@pytest.fixture
def last_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a script in this process, which has imported what it needs; its JSON."""

    def run(script: ModuleType, *words: str) -> dict[str, object]:
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *words])
        assert not script.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A preset of one layer: four take four times as long to compile."""
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1))
    return ("--preset", "tiny", "--rounds", "1")


def test_the_decode_benchmark_compares_the_same_tokens(last_line, tiny):
    result = last_line(bench_decode, *tiny, "--batch", "3", "--prompt", "12", "--new", "8")
    assert result["same_tokens"] is True
    assert result["ratio"] > 0
    assert result["batch"] == 3


def test_the_training_benchmark_gives_a_share_of_the_matmul_rate_and_its_formula(last_line, tiny):
    result = last_line(bench_train, *tiny, "--batch", "1", "--time", "16")
    assert 0 < result["share_of_matmul_rate"] < 1
    assert result["mfu"] is None, "a CPU has no known peak"
    assert "6·(parameters in matrix products)" in result["formula"]


@pytest.mark.parametrize(
    "kind", ["safetensors", "config", "index", "pt", "tokenizer", "vocab", "merges", "tokenizer_config", "gguf"]
)
def test_damaged_files_are_read_or_refused_in_one_line(kind: str, last_line):
    """Fifty here; the script does 10,000 of each format."""
    found = last_line(fuzz_formats, "--format", kind, "--count", "50")["formats"][kind]
    assert found["defects"] == []
    assert found["read"] + found["refused"] == 50
    assert found["refused"] > 20
