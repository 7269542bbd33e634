"""The benchmark of sampling runs, and ends with one JSON line that says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_sampling.py"


@pytest.mark.slow
def test_the_sampling_benchmark_compares_full_sampling_with_greedy_with_and_without_the_model():
    words = "--quick --hidden 32 --vocabulary 500 --layers 1 --batch 2 --prompt 4 --new 2 --rounds 1"
    done = subprocess.run([sys.executable, str(SCRIPT), *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["vocabulary"], found["hidden_size"]) == (500, 32)
    for what in ("step", "sampling_alone"):
        assert set(found["batch_2"][what]) == {"greedy", "full"}
        assert found["batch_2"][what]["greedy"]["ratio_to_greedy"] == 1.0
        assert found["batch_2"][what]["full"]["ratio_to_greedy"] > 0
