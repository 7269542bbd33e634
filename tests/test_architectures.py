"""Qwen3, Mistral's sliding window and yarn against stock transformers, from a folder to a folder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import often
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from jaxgpt import check, checkpoint, model
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import from_hf
from jaxgpt.formats import hf, importing
from jaxgpt.generate import Generator, Row
from jaxgpt.settings import GenerationSettings

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "eos_token_id": 7,
}
QWEN2 = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 84}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
TOLD = {"beta_fast": 16, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
CASES: dict[str, transformers.PreTrainedConfig] = {
    "qwen3": transformers.Qwen3Config(**(SIZES | {"hidden_size": 44})),
    "qwen3-biased-tied-yarn": transformers.Qwen3Config(
        **(SIZES | {"rope_parameters": YARN}), attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3-window": transformers.Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=17, max_window_layers=0),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=11),
    "mistral-without-window": transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2-yarn": transformers.Qwen2Config(**(QWEN2 | {"rope_parameters": YARN | {"attention_factor": 0.9}})),
    "llama-yarn-told": transformers.LlamaConfig(**(SIZES | {"rope_parameters": YARN | TOLD})),
}
"""Adversarial: all dimensions differ, 1 < K < N, H is not D / N (Qwen2's excepted: D / N is all it has)."""


def some(*cases: str) -> pytest.MarkDecorator:
    """Logits are compared in every case; what a window or norms, biases and angles could break further, in these."""
    return pytest.mark.parametrize("folder", often.exhaustive_but(cases, CASES), indirect=True)


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model of random weights of realistic scale, as transformers 5 saves it."""
    made = transformers.AutoModelForCausalLM.from_config(CASES[request.param], dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if "embed" in name else max(parameter.shape) ** -0.5
            mean, spread = (0.0, 0.2) if name.endswith("bias") else (1.0, 0.3) if parameter.dim() == 1 else (0.0, scale)
            parameter.copy_(mean + spread * noise)
    place = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def stock(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp("ours") / "checkpoint"
    importing.import_model(folder, place, golden=False)
    return checkpoint.load(place)


def params_of(ours: Checkpoint) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in ours.params.items()}


def random_ids(batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 131, (batch, time), dtype=np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


# -- Numbers ---------------------------------------------------------------------------


def test_logits_past_window_old_context_and_512_positions_diverge_by_less_than_1e_8_nats(ours: Checkpoint, stock: Any):
    ids = random_ids(2, 600)
    with torch.no_grad():
        expected = log_softmax(stock(torch.tensor(ids).long()).logits.numpy())
    logits = jax.jit(lambda params, ids: model.forward(ours.config, params, ids).logits)
    found = log_softmax(np.asarray(logits(params_of(ours), ids)))
    divergence = (np.exp(expected) * (expected - found)).sum(-1)
    assert divergence.shape == (2, 600)
    assert divergence.max() <= 1e-8  # requirement M2


def continued(made: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """transformers' greedy tokens of a batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made.generation_config.eos_token_id = None  # or it would take the place of the None below
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=steps, pad_token_id=0, eos_token_id=None)
    return made.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()


@pytest.mark.slow
@some("mistral")
def test_64_greedy_tokens_of_a_ragged_batch_are_those_of_transformers_padded_on_the_left(ours: Checkpoint, stock: Any):
    prompts = [random_ids(1, length)[0].tolist() for length in (70, 23, 9, 1)]
    generator = Generator(ours.config, params_of(ours), real_ids=131, stop_ids=[], dtype=jnp.float32)
    found: list[list[int]] = [[] for _ in prompts]
    for chunk in generator.stream([Row(prompt, 64, 0) for prompt in prompts], GenerationSettings(temperature=0.0)):
        for row, new in zip(found, chunk, strict=True):
            row.extend(new)
    expected = continued(stock, prompts, 64)
    assert found == expected
    assert len({token for row in expected for token in row}) > 8, "a loop over few tokens would prove little"


@pytest.mark.slow
@some("qwen3-biased-tied-yarn")
def test_gradients_of_every_parameter_are_those_of_torch(ours: Checkpoint, stock: Any):
    ids = random_ids(2, 90)
    targets = torch.tensor(ids[:, 1:]).long().flatten()
    stock.zero_grad()
    F.cross_entropy(stock(torch.tensor(ids).long()).logits[:, :-1].flatten(0, 1), targets).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in stock.named_parameters()}

    def loss(params: Any) -> jax.Array:
        logits = model.forward(ours.config, params, jnp.asarray(ids), remat=True).logits[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], -1).mean()

    found = dict(hf.weights.hf_tensors(ours.config, jax.jit(jax.grad(loss))(params_of(ours))))
    assert found.keys() == expected.keys()
    # Biases of keys move all scores of a query alike: their gradient is zero but for rounding, unless RoPE turns them.
    scale = max(float(np.linalg.norm(gradient)) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float(np.linalg.norm(found[name] - gradient))
        assert difference <= 1e-5 * float(np.linalg.norm(gradient)) + 1e-7 * scale, name
    normed = ours.config.qk_norm
    assert any("q_norm" in name for name in found) is normed


# -- Files -----------------------------------------------------------------------------


def loaded(folder: Path) -> dict[str, Any]:
    """A config as transformers understands it, provenance left out."""
    values = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path")}


def test_a_folder_comes_back_with_the_same_bytes_and_the_same_config(folder: Path, ours: Checkpoint, tmp_path: Path):
    hf.write(ours, tmp_path / "out")
    before, after = (safetensors.torch.load_file(place / hf.WEIGHTS) for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(
        a.dtype == after[n].dtype and a.numpy().tobytes() == after[n].numpy().tobytes() for n, a in before.items()
    )
    assert loaded(tmp_path / "out") == loaded(folder)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]


def test_a_config_as_transformers_4_wrote_it_is_the_same_model(folder: Path, ours: Checkpoint):
    new = json.loads((folder / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = {**new, "torch_dtype": new.pop("dtype"), "rope_theta": rope.pop("rope_theta")}
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert from_hf(old) == ours.config


@pytest.mark.slow
@some("mistral")
@pytest.mark.exhaustive
def test_the_self_check_passes_on_an_imported_model(ours: Checkpoint):
    lines = check.check(str(ours.path)).lines
    assert [line for line in lines if line.status == "FAIL"] == []
    assert {line.name for line in lines if line.status == "PASS"} >= {
        *("forward_parity_test", "kv_cache_parity_steps_test", "greedy_is_greedy_test"),
        *("cache_dtype_test", "single_batch_memorize_test"),
    }
