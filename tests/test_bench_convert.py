"""The benchmark of import and export runs, and ends with one JSON line that says what was measured."""

import json
import sys

import bench_convert
import pytest


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_conversion_benchmark_says_ratios_and_peak_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["bench_convert.py", "--preset", "tiny", "--rounds", "1"])
    bench_convert.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(found[f"{name}_ratio"] > 0 for name in ("import", "export_hf", "export_gguf"))
    assert found["bytes"] > 10_000_000
    if sys.platform == "linux":
        assert found["gguf_peak_bytes"] < 1.3 * found["bytes"] + 2**30
