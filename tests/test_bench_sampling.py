"""The benchmark of sampling runs, and ends with one JSON line that says what was measured."""

import json

import bench_sampling
import pytest


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_sampling_benchmark_compares_full_sampling_with_greedy_with_and_without_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = "--quick --hidden 32 --vocabulary 500 --layers 1 --batch 2 --prompt 4 --new 2 --rounds 1"
    monkeypatch.setattr("sys.argv", ["bench_sampling.py", *words.split()])
    bench_sampling.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["vocabulary"], found["hidden_size"]) == (500, 32)
    for what in ("step", "sampling_alone"):
        assert set(found["batch_2"][what]) == {"greedy", "full"}
        assert found["batch_2"][what]["greedy"]["ratio_to_greedy"] == 1.0
        assert found["batch_2"][what]["full"]["ratio_to_greedy"] > 0
