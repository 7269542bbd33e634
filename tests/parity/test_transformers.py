"""Our model against stock transformers: same weights, same logits, same greedy tokens."""

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import often
import pytest
import torch
import transformers

from jaxgpt import model, weights
from jaxgpt.config import ModelConfig, from_hf, hf_model_type, to_hf
from jaxgpt.generate import Generator, Row
from jaxgpt.settings import GenerationSettings


def stock(config: ModelConfig, params: dict[str, jax.Array]) -> transformers.PreTrainedModel:
    keys = to_hf(config, "float32")
    model_type = keys.pop("model_type")
    hf = transformers.AutoConfig.for_model(model_type, **keys, bos_token_id=None, eos_token_id=None)
    hf._attn_implementation = "eager"
    made = transformers.AutoModelForCausalLM.from_config(hf).eval()
    tensors = {name: torch.tensor(array) for name, array in weights.to_hf(config, params).items()}
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert not unexpected
    made.tie_weights()
    return made


def test_logits_equal_stock_transformers(config: ModelConfig):
    params = conftest.random_params(config)
    made = stock(config, params)
    ids = conftest.random_ids(config, 2, 30)
    with torch.no_grad():
        expected = made(torch.tensor(np.asarray(ids)).long()).logits.numpy()
        truth = made.double()(torch.tensor(np.asarray(ids)).long()).logits.numpy()
    logits = jax.jit(lambda params, ids: model.forward(config, params, ids).logits)
    ours = np.asarray(logits(params, ids), np.float64)
    # The yardstick is transformers' own float32 rounding against float64.
    noise = max(np.abs(expected - truth).max(), conftest.rounding(truth) / 10)
    assert np.abs(ours - truth).max() <= 4 * noise
    assert np.abs(ours - truth).mean() <= 4 * np.abs(expected - truth).mean()


@pytest.mark.parametrize("config", often.exhaustive_but(("gpt2-erf-untied", "qwen2"), conftest.CONFIGS), indirect=True)
def test_64_greedy_tokens_equal_stock_transformers(config: ModelConfig):
    """Window, norms of heads and yarn: tests/test_architectures.py."""
    params = conftest.random_params(config)
    made = stock(config, params)
    ids = conftest.random_ids(config, 1, 30)
    with torch.no_grad():
        tokens = made.generate(
            torch.tensor(np.asarray(ids)).long(),
            attention_mask=torch.ones(1, 30),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )[0, 30:].tolist()
    generator = Generator(config, params, real_ids=config.vocab_size, stop_ids=[], dtype=jnp.float32)
    row = Row(np.asarray(ids[0]).tolist(), 64, 0)
    mine = [i for (chunk,) in generator.stream([row], GenerationSettings()) for i in chunk]
    assert mine == tokens


def test_config_translation_is_the_one_transformers_writes(config: ModelConfig, tmp_path):
    keys = to_hf(config, "float32")
    hf = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys, bos_token_id=None, eos_token_id=None)
    assert from_hf(hf.to_dict()) == config
    assert hf.model_type == hf_model_type(config)


@pytest.mark.parametrize("old", [True, False], ids=["transformers 4 keys", "transformers 5 keys"])
def test_both_generations_of_config_keys_are_read(old: bool):
    config = conftest.CONFIGS["llama3-scaling"]
    keys = to_hf(config, "float32")
    for name in ("rope_parameters", "dtype") if old else ("rope_theta", "rope_scaling", "torch_dtype"):
        del keys[name]
    assert from_hf(keys) == config
