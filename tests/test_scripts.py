"""The benchmark scripts run, and end with one JSON line that says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def last_line(script: str, *words: str) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "scripts" / script), "--preset", "tiny", "--rounds", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_decode_benchmark_compares_the_same_tokens():
    result = last_line("bench_decode.py", "--batch", "3", "--prompt", "12", "--new", "8")
    assert result["same_tokens"] is True
    assert result["ratio"] > 0
    assert result["batch"] == 3


@pytest.mark.slow
def test_the_training_benchmark_gives_a_share_of_the_matmul_rate_and_its_formula():
    result = last_line("bench_train.py", "--batch", "1", "--time", "16")
    assert 0 < result["share_of_matmul_rate"] < 1
    assert result["mfu"] is None, "a CPU has no known peak"
    assert "6·(parameters in matrix products)" in result["formula"]


@pytest.mark.parametrize(
    "kind", ["safetensors", "config", "index", "pt", "tokenizer", "vocab", "merges", "tokenizer_config", "gguf"]
)
def test_damaged_files_are_read_or_refused_in_one_line(kind: str):
    """Fifty here; the script does 10,000 of each format."""
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_formats.py"), "--format", kind, "--count", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])["formats"][kind]
    assert found["defects"] == []
    assert found["read"] + found["refused"] == 50
    assert found["refused"] > 20
