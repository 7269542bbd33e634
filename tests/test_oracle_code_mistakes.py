"""Mistakes in the product's own files: one line of a copy is changed, and the report says which file to mend.

The catalogue plants its faults in a candidate's fields. Code that is wrong is wrong everywhere
at once: in forwards, cached steps and training, and wherever the oracle itself might lean on it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oracle import diagnosis, models
from oracle.faults import mutants
from oracle.faults.trial import compared
from oracle.ladder import LADDER
from oracle.noise import stored_calibration

ROOT = Path(__file__).parents[1]
MISTAKES = {
    # case: file, the line's text, what it becomes, then the name and the first tap
    "rope": (
        "jaxgpt/ops.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        "RoPE direction reversed",
        "layers.0.attn.q_rope",
    ),
    "cached position": (
        "jaxgpt/model.py",
        "slots = cache.lengths[:, None] + offsets",
        "slots = cache.lengths[:, None] + offsets + jnp.int32(ids.shape[1] == 1)",
        "cache offset off by one",
        "rope.angles",
    ),
    "accumulation": (
        "jaxgpt/train_step.py",
        "return summed / count",
        'return summed / (jnp.maximum(batch["mask"].sum(), 1.0) * batches["ids"].shape[0])',
        "gradient accumulation normalised per micro-batch",
        "loss.mean",
    ),
    "scale": (
        "jaxgpt/ops.py",
        " * width**-0.5",
        "",
        "attention scale missing",
        "layers.0.attn.scores",
    ),
    "causal": (
        "jaxgpt/ops.py",
        "key_slots[None, None, :] <= slots[:, :, None]",
        "key_slots[None, None, :] <= slots[:, :, None] + 1",
        "causal mask off by one",
        "mask",
    ),
    "lengths": (
        "jaxgpt/model.py",
        "lengths=cache.lengths + counts",
        "lengths=cache.lengths + ids.shape[1]",
        "padding counted as tokens",
        "rope.angles",
    ),
    "shift": (
        "jaxgpt/data/batches.py",
        "np.where(trained, tokens[1:], 0)",
        "np.where(trained, tokens[:-1], 0)",
        "label shift missing",
        "batch.targets",
    ),
    "schedule": (
        "jaxgpt/optimizer.py",
        "(step + 1) / (warmup + 1)",
        "step / max(warmup, 1)",
        "learning-rate schedule off by one",
        "learning_rate",
    ),
    "clipping": (
        "jaxgpt/optimizer.py",
        "        optax.clip_by_global_norm(settings.clip_norm),\n",
        "",
        "gradients not clipped by their global norm",
        "embed.tokens.weight",
    ),
    "decay": (
        "jaxgpt/optimizer.py",
        "mask=decayed,",
        "mask=None,",
        "decay applied to norms and biases",
        "layers.0.attn_norm.weight",
    ),
    "groups": (
        "jaxgpt/ops.py",
        "grouped = q.reshape(batch, k.shape[1], -1, time, width)",
        "grouped = q.reshape(batch, -1, k.shape[1], time, width).swapaxes(1, 2)",
        "query heads grouped in another order",
        "layers.0.attn.scores",
    ),
    "mask of the loss": (
        "jaxgpt/loss.py",
        'return jnp.sum(losses * batch["mask"])',
        'return jnp.sum(token_losses(output.logits, batch["targets"]))',
        "untrained places counted in the loss",
        "loss.mean",
    ),
    "row of a projection": (
        "jaxgpt/taps.py",
        'yield Op(f"{mlp}.gate", "projection", (f"{at}.mlp_norm",)',
        'yield Op(f"{mlp}.gate", "projection", (stream,)',
        "norm bypassed",
        "layers.0.mlp.gate",
    ),
    "row of a residual": (
        "jaxgpt/taps.py",
        'yield from residual_ops(f"{at}.mlp_residual", stream,',
        'yield from residual_ops(f"{at}.mlp_residual", f"{at}.mlp_norm",',
        "residual added to the normed stream",
        "layers.0.mlp_residual",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = models.MODELS["llama"] | {"num_hidden_layers": 2, "max_position_embeddings": 24}
    return models.write(small, tmp_path_factory.mktemp("hf"), "float32", 5)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_line_is_the_one_cause_and_its_file_is_named(case: str, folder: Path, tmp_path: Path):
    file, line, wrong, name, tap = MISTAKES[case]
    for package in ("jaxgpt", "torchref", "oracle"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file).read_text()
    assert text.count(line) == 1
    (tmp_path / file).write_text(text.replace(line, wrong))

    def run(*words: object) -> int:
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}).returncode

    assert run("jaxgpt", "import", folder, "checkpoint") == 0
    assert run("oracle", "bisect", "checkpoint", "--reference", folder, "--json", "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = [(cause["name"], cause["tap"], cause["proved"], file in cause["advice"]) for cause in report["causes"]]
    assert found == [(name, tap, True, True)]


@pytest.mark.slow
def test_a_mistake_of_the_batch_is_not_blamed_on_the_op_that_was_repaired():
    faults = [
        next(m.faults[0] for m in mutants.catalogue() if m.faults[0].id == id)
        for id in ("attention scale missing", "loss mask off by one")
    ]
    mutant = mutants.of(("pairs", tuple(fault.id for fault in faults), "llama", "float32"))
    comparison = compared(mutant, stored_calibration())
    rungs = [name for name in LADDER if name in ("operators", "loss")]
    report = diagnosis.bisect(comparison, rungs=rungs)
    assert [cause.name for cause in report.causes] == ["attention scale missing", "loss mask off by one"]
    assert not any("batch" in place for place in report.causes[0].also_at)
