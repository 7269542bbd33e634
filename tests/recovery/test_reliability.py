"""Runs killed and resumed, steps damaged: the trials of scripts/reliability_*.py, in small."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reliability_damage

from jaxgpt import array_files, checkpoint, manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def trial(script: str, *words: object, seconds: int = 900) -> dict[str, Any]:
    """The last line of a script that found nothing."""
    command = [sys.executable, ROOT / "scripts" / script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
def test_runs_killed_at_twenty_moments_go_on_as_if_nothing_had_happened():
    found = trial("reliability_kills.py", "--count", 20)
    assert (found["kills"], found["at_points_of_a_save"], found["problems"]) == (20, 10, 0)
    assert found["steps_compared"] >= 48


def test_no_damage_to_a_step_loads_and_resume_takes_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def through_maps(path: Path, tree: str, headers: Any) -> dict[str, np.ndarray]:
        # What Orbax reads is compared in other tests; it takes twenty times as long.
        arrays = {name: array_files.mapped(path / tree / name, header) for name, header in headers.items()}
        return {name: np.zeros(()) if array is None else array for name, array in arrays.items()}

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(checkpoint, "_read_arrays", through_maps)
    found = reliability_damage.Trial(tmp_path, seed=1)
    assert sum(array.ndim == 0 for array in (found.expected.train or {}).values()) == 1
    found.mutations(200)
    assert found.problems == []
    assert found.done == dict.fromkeys(reliability_damage.KINDS, 40)


@pytest.mark.parametrize("kind", reliability_damage.KINDS)
def test_every_mutation_changes_the_files_it_names_and_no_other(tmp_path: Path, kind: str):
    step = tmp_path / "step"
    step.mkdir()
    for name, data in {"a": b"\0\1\0\2", "b": b"x", "c": b"x"}.items():
        (step / name).write_bytes(data)
    for seed in range(20):
        before = {name: path.read_bytes() for name, path in manifest.files(step).items()}
        damaged = reliability_damage.mutate(step, kind, "a", random.Random(seed))
        after = {name: path.read_bytes() for name, path in manifest.files(step).items()}
        assert set(damaged) == {name for name in before if before[name] != after.get(name)}
        for name, data in before.items():
            (step / name).write_bytes(data)
