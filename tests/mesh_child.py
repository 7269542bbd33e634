"""Run by test_mesh.py in a process with eight CPU devices: what it finds, as JSON on the last line."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import conftest
import jax
import numpy as np

from jaxgpt import checkpoint, loss, mesh
from jaxgpt.config import ModelConfig
from jaxgpt.gates import random_batch
from jaxgpt.mesh import Layout
from jaxgpt.parallel_settings import MeshSettings
from jaxgpt.settings import TrainSettings
from jaxgpt.step_folder import Contents
from jaxgpt.train_step import TrainState, initial_state, stacked, train_step

SETTINGS = TrainSettings(steps=8, batch_size=16, accumulate=2, sequence_length=12, warmup_steps=2, learning_rate=1e-2)
GPT2 = dataclasses.replace(
    conftest.GPT2,
    num_hidden_layers=1,
    vocab_size=136,
    hidden_size=32,
    head_dim=8,
    embd_pdrop=0.1,
    attn_pdrop=0.1,
    resid_pdrop=0.1,
)
CONFIGS = {
    "gpt2 with dropout": (GPT2, [MeshSettings(2, 2, 2)]),
    "gpt2 in eighths": (GPT2, [MeshSettings(1, 8), MeshSettings(8)]),
    # 131 ids and a width of 42: little can be split but heads and matrices.
    "llama of odd sizes": (dataclasses.replace(conftest.LLAMA, num_hidden_layers=1), [MeshSettings(4, 1, 2)]),
    "qwen2, tied, with remat": (
        dataclasses.replace(
            conftest.CONFIGS["qwen2-tied"],
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
        ),
        [MeshSettings(1, 4, 2)],
    ),
}


def batches(config: ModelConfig) -> dict[str, Any]:
    """Two micro-batches of unequal masks."""
    one, other = random_batch(config, 16, 12), random_batch(config, 16, 12)
    other["ids"][:] = other["ids"][::-1]
    one["mask"][3:, 4:] = 0
    return dict(stacked([one, other]))


def share(array: jax.Array) -> float:
    """Of the array that one device has."""
    return array.addressable_shards[0].data.nbytes / array.nbytes


def trained(config: ModelConfig, settings: TrainSettings, layout: Layout) -> dict[str, Any]:
    state = initial_state(conftest.random_params(config), settings, layout)
    placed = layout.rows(batches(config), axis=1)
    some_rows = [random_batch(config, 16, 12), random_batch(config, 3, 12)]
    held_out = loss.evaluate(config, state.params, some_rows, "float32", layout)
    train_step.clear_cache()
    before, reports = state, []
    for _ in range(5):
        state, report = train_step(config, settings, "float32", state, placed, layout=layout)
        reports.append((float(report.loss), float(report.grad_norm)))
    kernel = "layers.0.mlp.up.kernel"
    stays = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, before)
    return {
        "reports": reports,
        "held_out": held_out,
        "stays": all(jax.tree.leaves(stays)),
        "programs": train_step._cache_size(),
        "kernel": share(state.params[kernel]),
        "moments": [share(leaf) for name, leaf in flat(state.moments).items() if name.endswith(kernel)],
        "devices": layout.devices,
    }


def compared(names: list[str]) -> dict[str, Any]:
    """Every mesh of these models against one device: largest differences of losses and gradient norms, relative."""
    found: dict[str, Any] = {}
    for name in names:
        config, meshes = CONFIGS[name]
        settings = dataclasses.replace(SETTINGS, remat="remat" in name)
        alone = trained(config, settings, mesh.ALONE)
        for asked in meshes:
            spread = trained(config, settings, mesh.layout(asked, config, settings.batch_size, []))
            apart = np.abs(np.asarray(spread["reports"]) / np.asarray(alone["reports"]) - 1).max(0).tolist()
            spread["held_out"] = abs(spread["held_out"] / alone["held_out"] - 1)
            title = tuple(size or 1 for size in dataclasses.astuple(asked))
            found[f"{name}: {title}"] = {**spread, "losses": apart[0], "norms": apart[1]}
    return found


def gathered(config: ModelConfig) -> list[str]:
    """What XLA gathers where weights are split eight ways and computed in bfloat16: the names of those values."""
    layout = mesh.layout(MeshSettings(1, 8), config, 16, [])
    params = dict(layout.place(conftest.random_params(config)))
    batch = layout.rows(random_batch(config, 16, 12))
    program = loss._batch_sum.lower(config, params, batch, "bfloat16", layout).compile().as_text()
    return re.findall(r" all-gather(?:-start)?\(%([\w.]+)", program)


def crossed(folder: Path) -> dict[str, Any]:
    """A state saved from 8 devices, loaded onto 4, saved, and so on to one: is every bit the same?"""
    found: dict[str, Any] = {}
    first: Any = None
    for step, asked in enumerate((MeshSettings(1, 8), MeshSettings(2, 2), MeshSettings(1, 1, 2), MeshSettings(1))):
        layout = mesh.layout(asked, GPT2, 16, [])
        state = at_first(layout) if first is None else loaded(folder, layout)
        leaves = {"params": dict(state.params), "train": flat(state.moments)}
        first = first or jax.tree.map(np.asarray, leaves)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), leaves, first)
        contents = Contents(
            config=GPT2,
            stage="base",
            compute_dtype="float32",
            eos_token_ids=[],
            tokenizer=None,
            template=None,
            provenance={},
            train_json={},
            **leaves,
        )
        checkpoint.save(folder, step, contents).result()
        files = len(list((folder / f"step-{step:08d}" / "params" / "layers.0.mlp.up.kernel").rglob("c/*/*")))
        found[str(layout.devices)] = {"same": all(jax.tree.leaves(same)), "files": files}
    return found


def at_first(layout: Layout) -> TrainState:
    """Random parameters, and moments in which nothing is zero."""
    state = initial_state(conftest.random_params(GPT2), SETTINGS, layout)
    rng = np.random.default_rng(0)
    return state._replace(
        moments=jax.tree.map(
            lambda a: a if a.ndim == 0 else layout.like(rng.standard_normal(a.shape, np.float32), a), state.moments
        )
    )


def loaded(folder: Path, layout: Layout) -> TrainState:
    step = checkpoint.load(folder, train=True)
    state = initial_state(step.params, SETTINGS, layout)
    train: Any = step.train
    leaves, structure = jax.tree.flatten(state.moments)
    placed = [layout.like(train[name], leaf) for name, leaf in zip(flat(state.moments), leaves, strict=True)]
    return state._replace(moments=jax.tree.unflatten(structure, placed))


def flat(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


if __name__ == "__main__":
    folder, *models = sys.argv[1:]
    print(json.dumps({"compared": compared(models), "crossed": crossed(Path(folder)), "gathered": gathered(GPT2)}))
