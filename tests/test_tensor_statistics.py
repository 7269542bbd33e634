"""Statistics of parameters: right numbers, alarms for damage, none for what real models hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS, random_params

from jaxgpt.tensor_statistics import TensorStatistics, tensor_statistics


def one(name: str, array: np.ndarray) -> TensorStatistics:
    return tensor_statistics({name: array})[0]


def normal(std: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, std, shape).astype(np.float32)


def test_numbers_are_those_of_numpy_in_float64():
    array = normal(3.0, 1100, 1000) + np.float32(5.0)  # more than one part
    found = one("layers.0.mlp.up.kernel", array)
    wide = array.astype(np.float64)
    assert found.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert found.std == pytest.approx(wide.std(), rel=1e-12)
    assert (found.min, found.max) == (wide.min(), wide.max())
    assert found.first == tuple(wide[0, :4])
    assert (found.shape, found.dtype) == ((1100, 1000), "float32")


def test_random_models_raise_no_alarm():
    for name in ("gpt2", "llama", "qwen2"):
        assert [s.alarm for s in tensor_statistics(random_params(CONFIGS[name])) if s.alarm] == []


def test_what_qwen2_holds_raises_no_alarm():
    norm = np.linspace(-2.28, 17.38, 896, dtype=np.float32).astype(jnp.bfloat16)
    bias = normal(7.88, 896).clip(-65.5, 128)
    bias[0] = 128
    assert one("layers.0.attn_norm.weight", norm).alarm == ""
    assert one("layers.0.attn.q.bias", bias).alarm == ""
    assert one("embed.tokens.weight", normal(0.015, 100, 50)).alarm == ""


@pytest.mark.parametrize(
    ("name", "array", "alarm"),
    [
        ("embed.tokens.weight", normal(1.0, 90, 90), "std 1 of an embedding; expected 0.005–0.5"),
        ("embed.tokens.weight", np.zeros((5, 5), np.float32), "std 0 of an embedding; expected 0.005–0.5"),
        ("final_norm.weight", np.full(9, 1e-3, np.float32), "magnitude 0.001, at most 0.001, of norm weights"),
        ("layers.1.mlp_norm.weight", np.full(9, -101.0, np.float32), "magnitude 101, at most 101, of norm weights"),
        ("layers.1.mlp.up.kernel", np.ones((4, 4), np.float32), "every value is the same"),
        ("layers.1.mlp.up.bias", np.array([1, np.nan, np.inf], np.float32), "2 values are NaN or infinity"),
    ],
)
def test_damage_raises_an_alarm(name: str, array: np.ndarray, alarm: str):
    assert one(name, array).alarm.startswith(alarm)


def test_bfloat16_bits_read_as_float16_raise_an_alarm():
    embedding = normal(0.02, 64, 64).astype(jnp.bfloat16).view(np.float16)
    assert "embedding" in one("embed.tokens.weight", embedding).alarm
