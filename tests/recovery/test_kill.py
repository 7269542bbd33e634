"""kill -9 at the worst moments: no acknowledged step is lost, no unfinished one counts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt import checkpoint, manifest, weights
from jaxgpt.checkpoint import Contents
from jaxgpt.config import ModelConfig

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=6,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=3,
    max_position_embeddings=16,
)
ROOT = Path(__file__).parents[2]


def contents(step: int) -> Contents:
    """Numpy only, so that a child needs no JAX; every value is the step's number."""
    return Contents(
        config=CONFIG,
        params={p.name: np.full(p.shape, step, np.float32) for p in weights.parameters(CONFIG)},
        stage="base",
        compute_dtype="float32",
        eos_token_ids=[1],
        tokenizer=None,
        template=None,
        provenance={},
        train={"step": np.int32(step)},
        train_json={"step": step},
    )


def assert_whole(directory: Path, step: int) -> None:
    found = checkpoint.load(directory, train=True)
    assert found.step == step
    assert all((array == step).all() for array in found.params.values())
    assert found.train is not None
    assert found.train["step"] == step
    assert found.train_json == {"step": step}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 1 and 2 acknowledged."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", step, contents(step)).result()
    return tmp_path / "run"


# In the child, Orbax is replaced by a copy of what it wrote, which saves the seconds it takes to import.
CHILD = """
import os, pathlib, shutil, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/recovery"]
from jaxgpt import checkpoint, manifest
import test_kill
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
class Written:
    def result(self): pass
def copy(partial, *_):
    shutil.copytree({arrays!r}, partial)
    return Written()
def after(function, number=1):
    calls = []
    def call(*args, **kwargs):
        calls.append(1)
        result = function(*args, **kwargs)
        if len(calls) == number: kill()
        return result
    return call
def delete_half(path, **_):
    files = sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())
    for file in files[: len(files) // 2]: file.unlink()
    if files: kill()
checkpoint._begin_arrays = copy
{patch}
checkpoint.save({directory!r}, {step}, test_kill.contents({step}), keep={keep}).result()
print("acknowledged")
"""

POINTS = {
    "arrays written": "checkpoint._seal = kill",
    "half of the JSON written": "pathlib.Path.write_text = after(pathlib.Path.write_text)",
    "before the manifest": "manifest.write_synced = kill",
    "manifest written": "manifest.write_synced = after(manifest.write_synced)",
    "before the rename": "os.rename = kill",
}


def arrays_of(step: int, folder: Path) -> Path:
    """What Orbax writes for a step."""
    found = checkpoint.save(folder / "source", step, contents(step)).result()
    for name in ("model.json", "train.json", manifest.MANIFEST):
        (found / name).unlink()
    return found


def killed(directory: Path, step: int, patch: str, arrays: Path, keep: int = 9) -> None:
    code = CHILD.format(root=str(ROOT), arrays=str(arrays), patch=patch, directory=str(directory), step=step, keep=keep)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("point", POINTS)
def test_a_save_killed_halfway_leaves_the_last_step(run: Path, tmp_path: Path, point: str):
    killed(run, 3, POINTS[point], arrays_of(3, tmp_path))
    assert [path.name for path in run.glob(".*")] == [".step-00000003.partial"]
    assert checkpoint.steps(run) == [1, 2]
    assert_whole(run, 2)
    assert [path.name for path in run.glob(".*")] == []
    checkpoint.save(run, 3, contents(3)).result()
    assert_whole(run, 3)


def test_a_step_renamed_before_the_kill_counts(run: Path, tmp_path: Path):
    killed(run, 3, "os.rename = after(os.rename)", arrays_of(3, tmp_path))
    assert_whole(run, 3)


@pytest.mark.parametrize(("renames", "value"), [(1, 2), (2, 2)])
def test_a_step_killed_while_it_is_replaced_is_the_old_or_the_new_one(
    run: Path, tmp_path: Path, renames: int, value: int
):
    killed(run, 2, f"os.rename = after(os.rename, {renames})", arrays_of(2, tmp_path))
    assert any(run.glob(".step-00000002.replaced"))
    assert checkpoint.steps(run) == [1, 2]
    assert checkpoint.load(run).step == 2
    assert_whole(run, value)
    assert {path.name for path in run.iterdir()} == {"step-00000001", "step-00000002"}


def test_a_kill_during_deletion_leaves_no_half_step_that_counts(run: Path, tmp_path: Path):
    killed(run, 3, "checkpoint.shutil.rmtree = delete_half", arrays_of(3, tmp_path), keep=1)
    assert len(list(run.glob(".step-*.trash"))) == 1
    assert checkpoint.steps(run)[-1] == 3
    for step in checkpoint.steps(run):
        manifest.verify(run / f"step-{step:08d}")
    assert_whole(run, 3)
    assert list(run.glob(".*")) == []


def test_the_next_save_removes_leftovers_too(run: Path):
    for name in ("partial", "partial.orbax-checkpoint-tmp", "trash"):
        shutil.copytree(run / "step-00000001", run / f".step-00000009.{name}")
    checkpoint.save(run, 3, contents(3)).result()
    assert sorted(path.name for path in run.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.exhaustive
def test_a_kill_while_orbax_writes_leaves_the_last_step(run: Path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/recovery')!r}]\n"
        "import test_kill as t\n"
        "from jaxgpt import checkpoint\n"
        f"run = {str(run)!r}\nfor step in range(int(sys.argv[1]), 500):\n"
        "    checkpoint.save(run, step, t.contents(step)).result(); print(step, flush=True)"
    )
    for seconds in (0.05, 0.29, 0.13):
        # A child goes on where the one before was killed: however slow it is, the newest step is then its own.
        first = checkpoint.steps(run)[-1] + 1
        child = subprocess.Popen([sys.executable, "-c", code, str(first)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert child.stdout is not None
        assert child.stdout.readline() == f"{first}\n"
        time.sleep(seconds)
        child.kill()
        acknowledged = [first, *(int(line) for line in child.stdout.read().split())][-1]
        child.wait()
        child.stdout.close()
        # One more may have been renamed than could still be told.
        assert checkpoint.load(run).step - acknowledged in (0, 1)
        assert_whole(run, checkpoint.steps(run)[-1])


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[tuple[str, str]] = []
    rename = os.rename

    def record_sync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def record_rename(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".partial"):
            events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    final = checkpoint.save(tmp_path, 5, contents(5)).result()
    events.append(("acknowledged", str(final)))
    at = events.index(("rename", str(final)))
    partial = str(tmp_path / ".step-00000005.partial")
    before = [path for kind, path in events[:at] if kind == "fsync"]
    names = manifest.files(final)
    folders = {str(Path(partial, name).parent) for name in names}
    assert {f"{partial}/{name}" for name in names} | folders <= set(before)
    listed = [path for path in before if path != f"{partial}/manifest.json" and path not in folders]
    assert before.index(f"{partial}/manifest.json") > max(
        map(before.index, (p for p in listed if Path(p).name in names))
    )
    assert before[-1] == partial
    assert events[at + 1 :] == [("fsync", str(tmp_path)), ("acknowledged", str(final))]
