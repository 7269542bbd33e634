"""The reference shares nothing with what it checks: held by its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchref

ALLOWED = {"torch", "safetensors", "jaxtyping", "torchref", *sys.stdlib_module_names}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_torchref_imports_torch_safetensors_and_jaxtyping_only() -> None:
    files = sorted(Path(torchref.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    assert {path.name: imported(path) - ALLOWED for path in files} == {path.name: set() for path in files}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a fresh process that imports, loads and trains: torch takes seconds to start."""
    code = """if True:
        import sys, torchref
        print([m for m in ('jax', 'jaxgpt', 'transformers', 'flax') if m in sys.modules])
        import json, pathlib
        from safetensors.torch import save_file
        from torchref import training
        folder = pathlib.Path(sys.argv[1])
        config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({k: v.clone() for k, v in torchref.build(config).state_dict().items()}, folder / "model.safetensors")
        model = torchref.load(folder)
        trainer = training.Trainer(model, training.Recipe(2, 0.1, "constant", 0, 0.0, 0.0, 0.1, 0.9, 0.9, 1.0))
        trainer.step(training.batches(training.packed([([1, 2, 3], [1, 1, 1])], 4), 4, 1))
        print(trainer.steps, "torch._dynamo" in sys.modules)
    """
    folder = str(tmp_path_factory.mktemp("torchref"))
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_importing_torchref_loads_neither_jax_nor_jaxgpt_nor_transformers(said: list[str]) -> None:
    assert said[0] == "[]"


def test_loading_and_training_the_reference_does_not_load_the_compiler_of_torch(said: list[str]) -> None:
    """It takes seconds, and nothing of it is used."""
    assert said[1:] == ["1 False"]
