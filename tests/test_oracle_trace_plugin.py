"""The pytest plugin: a model recorded in a test and held to a stored trace; and nobody else disturbed."""

import subprocess
import sys

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


pytest_plugins = "pytester"


def test_a_baseline_is_written_when_asked_for_held_to_and_told_of(pytester: pytest.Pytester):
    tmp_path = pytester.path

    def run(*arguments: str) -> tuple[int, str]:
        ran = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments)
        return ran.ret, ran.stdout.str()

    test = tmp_path / "test_mine.py"
    test.write_text(TEST.format(scale=3))
    code, said = run()
    assert code == 1
    assert "write it with pytest --oracle-update" in said
    assert not (tmp_path / "traces").exists()

    assert run("--oracle-update")[0] == 0
    stored = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert stored == ["test_mine.test_model_a_b_.again.trace", "test_mine.test_model_a_b_.trace"]

    test.write_text(TEST.format(scale=3.001))
    code, said = run()
    assert code == 1
    assert "FAIL. First divergence: logits (the 1 compared before it agree)" in said
    assert "the candidate is 1.00033 times the truth" in said


@pytest.mark.usefixtures("oracle_trace")
def test_the_plugin_is_loaded_by_itself(pytestconfig: pytest.Config):
    assert pytestconfig.pluginmanager.hasplugin("oracle_traces")


def test_loading_the_plugin_imports_no_library():
    code = (
        "import pytest, sys; before = set(sys.modules); import oracle.traces.plugin; print(*set(sys.modules) - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(ran.stdout.split()) == ["oracle", "oracle.traces", "oracle.traces.plugin"]
