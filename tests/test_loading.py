"""Loading for inference: hashed in a thread while JAX is imported, copied off the disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, random_params

import jaxgpt
from jaxgpt.checkpoint import save
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


def test_a_loaded_model_does_not_look_at_its_files_again(folder: Path):
    lm = jaxgpt.load(str(folder))
    before = lm.logits([[1, 2, 3]])
    for file in (folder / "step-00000001" / "params").rglob("c/**/*"):
        if file.is_file():
            with file.open("r+b") as opened:
                opened.write(bytes(file.stat().st_size))
    assert np.array_equal(lm.logits([[1, 2, 3]]), before)
    assert np.abs(before).max() > 0
