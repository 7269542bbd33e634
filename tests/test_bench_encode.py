"""The benchmark of encoding runs, and ends with one JSON line that says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_encode.py"


def test_the_encoding_benchmark_says_ratios_and_what_each_part_cost(tmp_path: Path):
    (tmp_path / "a.py").write_text("def fibonacci(n):\n    return n\n" * 400)
    (tmp_path / "b.py").write_text("x = 1  # a line\n" * 400)
    (tmp_path / "c.py").write_text("y = 2\n" * 40)
    (tmp_path / "d.py").write_text("z = 3\n" * 40)
    names = [tmp_path / f"{i}.py" for i in range(100)]
    for name in names:
        name.write_text("pass\n")
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--source", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["documents"] == 104
    for name in ("gpt2", "tokenizer.json"):
        assert found[name]["ratio"] > 0
        assert set(found[name]["parts_s"]) == {"reading", "sample", "encoding", "index"}
