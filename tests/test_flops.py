"""Arithmetic and traffic by formula, against what XLA counts in the compiled program, and rates against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import GPT2, LLAMA

from jaxgpt import device_rates, flops, model, transformer
from jaxgpt.config import ModelConfig

WIDE = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 64}


def wide(config: ModelConfig) -> ModelConfig:
    """Wide enough for matrix products to be most of the work, as in any model worth measuring."""
    return dataclasses.replace(config, num_hidden_layers=1, **WIDE)


@pytest.mark.parametrize("config", [wide(GPT2), wide(LLAMA)], ids=["gpt2", "llama"])
def test_the_forward_takes_the_flops_that_xla_counts(config: ModelConfig):
    ids = jnp.zeros((2, 32), jnp.int32)
    params = transformer.init(config, 0)
    forward = jax.jit(lambda params, ids: model.forward(config, params, ids).logits)
    counted = forward.lower(params, ids).compile().cost_analysis()["flops"] / ids.size
    by_formula = flops.forward_flops_per_token(config, ids.shape[1])
    assert by_formula == flops.flops_per_token(config, ids.shape[1]) / 3
    # XLA counts norms, softmax and activations too.
    assert by_formula < counted < 1.15 * by_formula


@pytest.mark.parametrize("config", [wide(GPT2), wide(LLAMA)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoding_reads_each_weight_once_rows_looked_up_not_and_the_cache(config: ModelConfig, tied: bool):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    sizes = {name: array.size for name, array in transformer.init(config, 0).items()}
    looked_up = [sizes.get("embed.positions.weight", 0), 0 if tied else sizes["embed.tokens.weight"]]
    weights = sum(sizes.values()) - sum(looked_up)
    cache = 2 * config.num_key_value_heads * config.head_dim * 10
    assert flops.bytes_per_decoded_token(config, 0, 4) == 4 * weights
    assert flops.bytes_per_decoded_token(config, 10, 2) == 2 * (weights + cache)


def test_the_yardsticks_are_measured_and_possible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(device_rates.COPIED, "cpu", 1 << 22)
    monkeypatch.setitem(device_rates.SIDE, "cpu", 256)
    # No machine does less than 10 MB/s and 10 MFLOP/s, none more than 100 TB/s and 100 PFLOP/s.
    assert 1e7 < device_rates.copy_rate() < 1e14
    assert 1e7 < device_rates.matmul_rate("float32") < 1e17
