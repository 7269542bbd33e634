"""The benchmark of import and export runs, and ends with one JSON line that says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_convert.py"


@pytest.mark.slow
def test_the_conversion_benchmark_says_ratios_and_peak_memory():
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[f"{name}_ratio"] > 0 for name in ("import", "export_hf", "export_gguf"))
    assert found["bytes"] > 10_000_000
    if sys.platform == "linux":
        assert found["gguf_peak_bytes"] < 1.3 * found["bytes"] + 2**30
