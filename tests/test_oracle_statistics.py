"""The oracle's rung of statistics: no alarm for real and fresh models, one for what no model can be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, random_params
from safetensors.numpy import save_file

from jaxgpt import weights
from jaxgpt.config import ModelConfig, to_hf
from oracle import diagnosis, folder, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.rungs import statistics

WIDE = dataclasses.replace(CONFIGS["llama"], hidden_size=84, intermediate_size=104, vocab_size=260)


def run(config: ModelConfig, stored: dict[str, Any], source: Path | None = None) -> dict[str, str]:
    """The problem of every parameter that has one."""
    candidate = Candidate(config, stored, "float32")
    comparison = Comparison(candidate, cast(Reference, None), None, source, noise.stored_calibration())
    return {f"{f.tap}.{f.op}": f.problem for f in statistics.run(comparison).findings if not f.ok}


def normal(std: float, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, std, shape).astype(np.float32)


def stored(config: ModelConfig = WIDE, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {name: np.asarray(array).astype(dtype) for name, array in random_params(config).items()}


# -- Numbers ---------------------------------------------------------------------------


def test_numbers_are_those_of_numpy_whatever_the_layout():
    array = normal(3.0, 1100, 1000) + np.float32(5.0)  # more than one block
    for given in (array, np.asfortranarray(array), array.T):
        found, wide = statistics.measure(given), given.astype(np.float64)
        assert found.mean == pytest.approx(wide.mean(), rel=1e-12)
        assert found.std == pytest.approx(wide.std(), rel=1e-9)
        assert (found.smallest, found.largest, found.count) == (wide.min(), wide.max(), wide.size)
        assert found.small == int((np.abs(given) < 0.25 * np.sqrt(np.square(wide).mean())).sum())


def test_a_large_array_is_never_copied_whole_in_float64():
    import tracemalloc

    array = normal(0.02, 4096, 1024).T
    tracemalloc.start()
    statistics.measure(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 8 * (1 << 20) < 2 * 8 * array.size, f"{peak:,} bytes for {array.nbytes:,}"


# -- No alarm --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_freshly_initialised_models_raise_no_alarm(name: str):
    settings = to_hf(CONFIGS[name], "float32")
    kinds: Any = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(kinds[settings["model_type"]](**settings))
    tensors = {key: tensor.numpy() for key, tensor in fresh.state_dict().items() if key != "lm_head.weight"}
    if not CONFIGS[name].tie_word_embeddings:
        tensors["lm_head.weight"] = fresh.state_dict()["lm_head.weight"].numpy()
    assert run(CONFIGS[name], folder.parameters(tensors)) == {}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_models_of_every_family_and_dtype_raise_no_alarm(name: str, dtype: str):
    assert run(CONFIGS[name], stored(CONFIGS[name], jnp.dtype(dtype))) == {}


@pytest.mark.parametrize("name", models.MODELS)
def test_the_oracles_own_models_raise_no_alarm(name: str, tmp_path: Path):
    candidate = models.candidate(models.write(models.MODELS[name], tmp_path, "bfloat16", 3), "bfloat16")
    assert run(candidate.config, dict(candidate.stored)) == {}


REAL: dict[str, tuple[str, np.ndarray]] = {
    # Ranges printed from the published files of these models.
    "Qwen2-0.5B norm": ("layers.0.attn_norm.weight", np.linspace(-2.28, 17.38, 84).astype(jnp.bfloat16)),
    "Qwen2-0.5B query bias": ("layers.0.attn.q.bias", np.clip(normal(40, 84), -65.5, 128)),
    "Qwen2 key bias in the hundreds": ("layers.0.attn.k.bias", np.linspace(-410, 380, 28, dtype=np.float32)),
    "Llama-2-7B first norm, near zero": ("layers.0.attn_norm.weight", np.abs(normal(0.01, 84))),
    "GPT-2 final norm, to 20": ("final_norm.weight", np.linspace(0.9, 20, 84, dtype=np.float32)),
    "Llama embedding, std 0.001": ("embed.tokens.weight", normal(1e-3, 260, 84)),
    "embedding of std 1": ("embed.tokens.weight", normal(1.0, 260, 84)),
    "kernel of std 1 (small models)": ("layers.1.mlp.up.kernel", normal(1.0, 84, 104)),
    "GPT-2 outlier beyond 10 in a projection": (
        "layers.1.mlp.down.kernel",
        np.where(np.arange(104 * 84).reshape(104, 84) == 77, 14.0, normal(0.1, 104, 84)).astype(np.float32),
    ),
    "ternary weights": (
        "layers.1.mlp.up.kernel",
        np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (84, 104)).astype(np.float32),
    ),
    "padding of the vocabulary": (
        "embed.tokens.weight",
        np.concatenate([normal(0.02, 60, 84), np.zeros((200, 84), np.float32)]),
    ),
    "dead neurons": ("layers.1.mlp.up.kernel", normal(0.02, 84, 104) * (np.arange(104) > 40)),
    "keys stored once for every query head": ("layers.1.attn.k.kernel", np.tile(normal(0.02, 84, 14), 2)),
    "zero bias": ("layers.0.attn.q.bias", np.zeros(84, np.float32)),
}


@pytest.mark.parametrize("case", REAL)
def test_what_real_models_hold_raises_no_alarm(case: str):
    name, array = REAL[case]
    assert run(WIDE, {**stored(), name: array}) == {}


def test_a_head_that_repeats_the_embedding_is_no_copy():
    params = stored()
    assert run(WIDE, {**params, "head.weight": params["embed.tokens.weight"].copy()}) == {}


def test_repeated_layers_are_no_mistake_where_the_source_has_them_too(tmp_path: Path):
    params = stored(CONFIGS["llama"])
    for name in [name for name in params if name.startswith("layers.1.") and name.endswith("kernel")]:
        params[name] = params[name.replace("layers.1.", "layers.0.")]
    save_file(weights.to_hf(CONFIGS["llama"], params), tmp_path / "model.safetensors")
    assert run(CONFIGS["llama"], params, tmp_path) == {}
    assert len(run(CONFIGS["llama"], params)) == 7


# -- Alarms ----------------------------------------------------------------------------


def misread(array: np.ndarray) -> np.ndarray:
    return array.astype(jnp.bfloat16).view(np.float16).astype(np.float32)


UP = "layers.1.mlp.up.kernel"
BROKEN: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "NaN": (UP, lambda a: np.where(a == a[3, 3], np.nan, a), "1 of 8,736 values are NaN or infinity"),
    "infinity in a bias": ("final_norm.weight", lambda a: a / (np.arange(84) > 1), "2 of 84 values are NaN or"),
    "zero": (UP, np.zeros_like, "is zero everywhere"),
    "zero norm": ("final_norm.weight", np.zeros_like, "magnitude 0 of norm weights; expected 0.0001–1000"),
    "constant": (UP, lambda a: np.full_like(a, 0.02), "every value is the same, 0.02"),
    "bf16 as fp16": (UP, lambda a: misread(normal(0.02, *a.shape)), "as of bfloat16 bits read as float16"),
    "bf16 as fp16, large": (UP, lambda a: misread(normal(0.3, *a.shape)), "as of bfloat16 bits read as float16"),
    "bf16 as fp16, embedding": ("embed.tokens.weight", misread, "as of bfloat16 bits read as float16"),
    "fp16 as bf16": (UP, lambda a: a.astype(np.float16).view(jnp.bfloat16), "of a kernel; expected 1e-06–100"),
    "absurd value": ("layers.0.attn_norm.weight", lambda a: a * 1e6, "expected magnitudes below 10000"),
    "unscaled integers": (UP, lambda a: np.round(a * 5000), "of a kernel; expected 1e-06–100"),
    "one row everywhere": (
        UP,
        lambda a: np.repeat(a[:1], len(a), 0) * 1.0,
        "of its 84 rows repeat another bit for bit",
    ),
    "rows twice": (UP, lambda a: np.concatenate([a[:30], a[:30], a[:24]]), "64% of its 84 rows repeat another"),
    "columns thrice": (UP, lambda a: np.tile(a[:, :30], 4)[:, :104], "71% of its 104 columns repeat another"),
    "one embedding for all": ("embed.tokens.weight", lambda a: np.repeat(a[:2], 130, 0), "99% of its 260 rows repeat"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_no_model_can_be_raises_one_alarm(case: str):
    name, change, problem = BROKEN[case]
    params = stored()
    with np.errstate(divide="ignore"):
        found = run(WIDE, {**params, name: change(params[name])})
    assert list(found) == [name]
    assert problem in found[name]


def test_a_matrix_copied_from_another_layer_is_named_with_its_origin():
    params = stored()
    found = run(WIDE, {**params, UP: params["layers.0.mlp.up.kernel"].copy()})
    assert found == {UP: "bit for bit the same as layers.0.mlp.up.kernel"}
    nearly = params["layers.0.mlp.up.kernel"].copy()
    nearly[5, 5] = np.nextafter(nearly[5, 5], np.float32(1))
    assert run(WIDE, {**params, UP: nearly}) == {}


def test_bits_read_in_the_wrong_dtype_are_named_and_undone_everywhere():
    params = stored()
    wrong = {name: misread(normal(0.02, *params[name].shape)) for name in (UP, "layers.0.attn.q.kernel")}
    candidate = Candidate(WIDE, {**params, **wrong}, "float32")
    comparison = Comparison(candidate, cast(Reference, None), None, None, noise.stored_calibration())
    report = diagnosis.bisect(comparison, rungs=(statistics.NAME,))
    (cause,) = report.causes
    assert (cause.name, cause.tap, cause.change) == (
        "bits read in the wrong dtype", "layers.0.attn.q", "with the bits read as bfloat16",
    )  # fmt: skip
    assert cause.proved
    assert list(cause.also_at) == ["layers.1.mlp.up"]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"


def test_a_copy_has_no_repair_that_could_be_proved():
    params = stored()
    candidate = Candidate(WIDE, {**params, UP: params["layers.0.mlp.up.kernel"]}, "float32")
    comparison = Comparison(candidate, cast(Reference, None), None, None, noise.stored_calibration())
    (cause,) = diagnosis.bisect(comparison, rungs=(statistics.NAME,)).causes
    assert (cause.name, cause.proved) == ("unknown", False)


def test_gate_loaded_into_up_is_a_copy():
    params = stored()
    params["layers.1.mlp.up.kernel"] = params["layers.1.mlp.gate.kernel"]
    assert run(WIDE, params) == {"layers.1.mlp.up.kernel": "bit for bit the same as layers.1.mlp.gate.kernel"}
