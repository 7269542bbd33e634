"""Loading for inference: hashed in a thread while JAX is imported, copied off the disk."""

import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from conftest import GPT2, random_params

import jaxgpt
from jaxgpt import checkpoint, manifest
from jaxgpt.checkpoint import save
from jaxgpt.errors import InputError
from jaxgpt.step_folder import Contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    save(out, 1, Contents(GPT2, random_params(GPT2), "base", "float32", [], None, None, {})).result()
    return out


def test_what_the_thread_does_imports_nothing(folder: Path):
    code = (
        "import sys; from jaxgpt import checkpoint; before = set(sys.modules); "
        f"checkpoint.verify({str(folder)!r}); print(set(sys.modules) - before, 'jax' in before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # Two threads that import parts of JAX at once find each other's modules half made.
    assert ran.stdout == "set() False\n", ran.stderr


def test_nobody_waits_for_hashes_of_a_load_that_failed_already(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[Path] = []

    def slowly(path: Path, stop: Event) -> str:
        hashed.append(path)
        assert stop.wait(20), "told to stop"
        raise InputError("stopped")

    monkeypatch.setattr(manifest, "sha256", slowly)
    with pytest.raises(InputError, match="--device gpu requested"):
        jaxgpt.load(str(folder), device="gpu")
    assert len(hashed) < 2


def test_hashing_ends_once_it_is_told_to(folder: Path):
    stop = Event()
    stop.set()
    with pytest.raises(InputError, match="was not hashed to its end"):
        manifest.verify(folder / "step-00000001", stop=stop)


def test_a_step_that_is_replaced_while_it_is_loaded_is_refused(folder: Path, tmp_path: Path):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    verified = checkpoint.verify(run)
    other = Contents(GPT2, random_params(GPT2, seed=1), "base", "float32", [], None, None, {})
    shutil.rmtree(run / "step-00000001")
    message = "^checkpoint step 1 was removed or saved anew while it was being loaded; load again$"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.read(verified)
    save(run, 1, other).result()
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.read(verified)
    assert checkpoint.load(run).step == 1


def test_loaded_parameters_cannot_be_changed_under_the_model(folder: Path):
    (name, array), *_ = checkpoint.load(folder).params.items()
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True
    assert name


def test_a_loaded_model_does_not_look_at_its_files_again(folder: Path):
    lm = jaxgpt.load(str(folder))
    before = lm.logits([[1, 2, 3]])
    for file in (folder / "step-00000001" / "params").rglob("c/**/*"):
        if file.is_file():
            with file.open("r+b") as opened:
                opened.write(bytes(file.stat().st_size))
    assert np.array_equal(lm.logits([[1, 2, 3]]), before)
    assert np.abs(before).max() > 0
