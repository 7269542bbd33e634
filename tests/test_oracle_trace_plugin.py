"""The pytest plugin: a model recorded in a test and held to a stored trace; and nobody else disturbed."""

import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import numpy as np
import pytest

SCALE = {scale}

@pytest.mark.parametrize("kind", ["a/b"])
def test_model(kind, oracle_trace, oracle_baseline):
    trace = oracle_trace(lambda x: {{"h": x * 2, "logits": x * SCALE}}, np.arange(1.0, 5.0, dtype=np.float32))
    oracle_baseline(trace)
    oracle_baseline(trace, "again")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_baseline_is_written_when_asked_for_held_to_and_told_of(tmp_path: Path):
    test = tmp_path / "test_mine.py"
    test.write_text(TEST.format(scale=3))
    missing = run(tmp_path)
    assert missing.returncode == 1
    assert "write it with pytest --oracle-update" in missing.stdout
    assert not (tmp_path / "traces").exists()

    assert run(tmp_path, "--oracle-update").returncode == 0
    stored = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert stored == ["test_mine.test_model_a_b_.again.trace", "test_mine.test_model_a_b_.trace"]

    test.write_text(TEST.format(scale=3.001))
    changed = run(tmp_path)
    assert changed.returncode == 1
    assert "FAIL. First divergence: logits (the 1 compared before it agree)" in changed.stdout
    assert "the candidate is 1.00033 times the truth" in changed.stdout


@pytest.mark.usefixtures("oracle_trace")
def test_the_plugin_is_loaded_by_itself(pytestconfig: pytest.Config):
    assert pytestconfig.pluginmanager.hasplugin("oracle_traces")


def test_loading_the_plugin_imports_no_library():
    code = (
        "import pytest, sys; before = set(sys.modules); import oracle.traces.plugin; print(*set(sys.modules) - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(ran.stdout.split()) == ["oracle", "oracle.traces", "oracle.traces.plugin"]
