"""What torchref refuses to load, and the words it says."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import torchref
from torchref.config import LlamaConfig, read

GPT2 = {"vocab_size": 131, "n_embd": 36, "n_inner": 52, "n_layer": 3, "n_head": 4, "n_positions": 640}
LLAMA = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass
class Folder:
    """A folder to spoil."""

    path: Path

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.path / "model.safetensors")

    def configure(self, **changes: object) -> None:
        raw = json.loads((self.path / "config.json").read_text())
        (self.path / "config.json").write_text(json.dumps(raw | changes))

    def index(self, **shards: str) -> None:
        (self.path / "model.safetensors").unlink()
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    def refusal(self) -> str:
        with pytest.raises(torchref.LoadError) as caught:
            torchref.load(self.path)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path)
    return Folder(tmp_path)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Folder:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    return Folder(tmp_path)


def test_gpt2_with_the_names_of_the_hub_gives_the_same_model(folder: Folder) -> None:
    expected = torchref.load(folder.path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in folder.tensors().items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 640, 640, dtype=torch.uint8).tril() for i in range(3)}
    folder.save({**tensors, **masks})
    ids = torch.arange(9)[None]
    assert torch.equal(torchref.load(folder.path)(ids), expected(ids))


def test_layers_that_no_file_could_hold_are_refused_before_they_are_built(llama_folder: Folder) -> None:
    llama_folder.configure(num_hidden_layers=10**9)
    assert "has 1,000,000,000 layers, the weights are" in llama_folder.refusal()


def test_a_missing_tensor_is_refused(folder: Folder) -> None:
    tensors = folder.tensors()
    del tensors["transformer.h.2.attn.c_attn.weight"]
    folder.save(tensors)
    assert folder.refusal() == "the weights lack 1 of 41 tensors: transformer.h.2.attn.c_attn.weight"


def test_a_tensor_too_many_is_refused(folder: Folder) -> None:
    folder.save({**folder.tensors(), "transformer.h.9.ln_1.weight": torch.ones(36)})
    assert "have 1 tensors the model does not: transformer.h.9.ln_1.weight" in folder.refusal()


def test_another_shape_is_refused(folder: Folder) -> None:
    folder.configure(n_positions=64)
    assert "have other shapes: transformer.wpe.weight (file [640, 36], model [64, 36])" in folder.refusal()


def test_a_head_that_differs_from_its_tie_is_refused(folder: Folder) -> None:
    head = folder.tensors()["transformer.wte.weight"].clone()
    folder.save({**folder.tensors(), "lm_head.weight": head})
    torchref.load(folder.path)
    folder.save({**folder.tensors(), "lm_head.weight": -head})
    assert "lm_head.weight differs from transformer.wte.weight" in folder.refusal()


def test_mixed_dtypes_are_refused_unless_one_is_named(folder: Folder) -> None:
    tensors = folder.tensors()
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].half()
    folder.save(tensors)
    assert "the weights are F16, F32; expected one of" in folder.refusal()
    assert torchref.load(folder.path, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "..", "a/b.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(folder: Folder, name: str) -> None:
    folder.index(**{"transformer.wte.weight": name})
    assert f"names {name}, outside the model directory; refused" in folder.refusal()


def test_an_index_that_names_a_missing_shard_is_refused(folder: Folder) -> None:
    folder.index(**{"transformer.wte.weight": "model-00001-of-00002.safetensors"})
    assert "names model-00001-of-00002.safetensors, which" in folder.refusal()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON: it is nested too deeply"),
        ("[]", "holds a list; expected a JSON object"),
        *((text, "has no weight_map from tensors to files") for text in ("{}", '{"weight_map": []}')),
        *((f'{{"weight_map": {text}}}', "has no weight_map from tensors to files") for text in ("{}", '{"a": 5}')),
    ],
)
def test_an_index_that_is_none_is_refused(folder: Folder, text: str, words: str) -> None:
    folder.index()
    (folder.path / "model.safetensors.index.json").write_text(text)
    assert words in folder.refusal()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_parameters_that_are_no_floats_are_refused_whatever_dtype_is_asked_for(
    folder: Folder, dtype: torch.dtype
) -> None:
    name = "transformer.h.1.ln_1.weight"
    folder.save({**folder.tensors(), name: torch.ones(36).to(dtype)})
    with pytest.raises(torchref.LoadError, match=rf"hold what is not F64, F32, F16, BF16: {name} \("):
        torchref.load(folder.path, torch.float32)


def test_frequencies_that_old_llama_files_carry_are_left_out(llama_folder: Folder) -> None:
    expected = torchref.load(llama_folder.path)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(7) for i in range(3)}
    llama_folder.save({**llama_folder.tensors(), **buffers})
    ids = torch.arange(9)[None]
    assert torch.equal(torchref.load(llama_folder.path)(ids), expected(ids))


def test_two_shards_with_the_same_tensor_are_refused(folder: Folder) -> None:
    save_file(folder.tensors(), folder.path / "a.safetensors")
    save_file(folder.tensors(), folder.path / "b.safetensors")
    folder.index(one="a.safetensors", two="b.safetensors")
    assert "b.safetensors repeats tensors of another shard: transformer.h.0.attn.c_attn.bias" in folder.refusal()


def test_a_damaged_file_is_refused(folder: Folder) -> None:
    file = folder.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "model.safetensors cannot be read as safetensors: " in folder.refusal()


def test_a_folder_without_weights_or_config_is_refused(folder: Folder) -> None:
    (folder.path / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in folder.refusal()
    (folder.path / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in folder.refusal()
    (folder.path / "config.json").unlink()
    assert "has no config.json; expected a Hugging Face model folder" in folder.refusal()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "has model_type 'mamba'; torchref reads gpt2, llama, mistral, qwen2 and qwen3"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "torchref has one window for all layers"),
        ({"model_type": "mistral", "attention_bias": True}, "does not know: attention_bias"),
        ({"use_sliding_window": True}, "has use_sliding_window=True; torchref implements False only"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}, "one window for all layers"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 0}, "has sliding_window=0; expected a"),
        ({"model_type": "qwen3", "head_dim": None}, "lacks head_dim"),
        ({"model_type": "qwen3", "mlp_bias": True}, "does not know: mlp_bias"),
        ({"logit_scale": 2.0}, "has keys torchref does not know: logit_scale"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "has rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 32}},
            "beta_fast is not above beta_slow",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "finetuned": True}}, "does not know: finetuned"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "does not know: beta"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is not above low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "implements 1.0 only"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "42"}, "has hidden_size='42'; expected a positive integer"),
        ({"rms_norm_eps": -1.0}, "has rms_norm_eps=-1.0; expected a positive number"),
        ({"attention_bias": 1}, "has attention_bias=1; expected true or false"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6, which is not a multiple of num_key_value_heads=4"),
        ({"head_dim": 13}, "head_dim=13, which is not a multiple of the pair size of RoPE=2"),
        ({"head_dim": None, "hidden_size": 44}, "hidden_size=44, which is not a multiple of num_attention_heads=6"),
        ({"hidden_act": "relu"}, "has hidden_act='relu'"),
        ({"layer_types": ["sliding_attention"]}, "torchref has one window for all layers"),
        ({"layer_types": ["chunked_attention"]}, "torchref knows full_attention and sliding_attention"),
        ({"layer_types": True}, "has layer_types=True; torchref knows full_attention and sliding_attention"),
        ({"layer_types": 3}, "has layer_types=3; torchref knows full_attention and sliding_attention"),
        ({"model_type": ["llama"]}, "has model_type ['llama']; torchref reads"),
        ({"hidden_act": {}}, "has hidden_act={}; torchref knows"),
        ({"rope_parameters": ["x"]}, "has rope_parameters=['x']; expected an object"),
        ({"rope_parameters": "x"}, "has rope_parameters='x'; expected an object"),
        ({"rope_parameters": True}, "has rope_parameters=True; expected an object"),
        ({"num_attention_heads": 6 * 10**29}, "; expected at most 268,435,456"),
        ({"head_dim": 10**30}, "; expected at most 268,435,456"),
        ({"head_dim": 2**28}, "has 6 heads of dimension 268435456; expected at most"),
        ({"rms_norm_eps": 10**400}, "; expected a positive number"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "; expected a positive number"),
    ],
)
def test_a_llama_config_that_means_another_model_is_refused(
    llama_folder: Folder, changes: dict[str, object], words: str
) -> None:
    llama_folder.configure(**changes)
    assert words in llama_folder.refusal()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "implements False only"),
        ({"n_head": 5}, "n_embd=36, which is not a multiple of n_head=5"),
        ({"num_key_value_heads": 2}, "does not know: num_key_value_heads"),
    ],
)
def test_a_gpt2_config_that_means_another_model_is_refused(
    folder: Folder, changes: dict[str, object], words: str
) -> None:
    folder.configure(**changes)
    assert words in folder.refusal()


def test_a_missing_key_means_what_transformers_has_for_the_type() -> None:
    raw = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "head_dim")}
    raw |= {"hidden_size": 128, "num_attention_heads": 64, "num_hidden_layers": 1}
    without_context = {key: value for key, value in raw.items() if key != "max_position_embeddings"}
    assert torchref.build(raw | {"model_type": "qwen2"}).kv_heads == 32
    assert torchref.build(raw | {"model_type": "llama"}).kv_heads == 64
    assert torchref.build(raw | {"model_type": "qwen2", "num_key_value_heads": None}).kv_heads == 64
    assert torchref.build(raw | {"model_type": "mistral"}).kv_heads == 8
    qwen3 = torchref.build(raw | {"model_type": "qwen3", "max_position_embeddings": 40})
    assert (qwen3.kv_heads, qwen3.head_dim) == (32, 128)
    yarn = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    for model_type, context in (("llama", 2048), ("mistral", 131072), ("qwen2", 32768), ("qwen3", 32768)):
        config = read(without_context | yarn | {"model_type": model_type})
        assert isinstance(config, LlamaConfig)
        assert config.rope.original_max_position_embeddings == context
        assert config.sliding_window == (4096 if model_type == "mistral" else None)
