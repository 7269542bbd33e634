"""Hugging Face folders: stock transformers reads what is written, and nothing else than a model is read."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import CONFIGS, random_params
from hostile_weights import edit_json, edit_tensors, header_of
from often import exhaustive_but

from jaxgpt import checkpoint, cli, config, weights
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError
from jaxgpt.formats import hf, importing, safetensors_file
from jaxgpt.formats.mislabelled import mislabelled
from jaxgpt.tokenizer import Tokenizer

NAMES = ["gpt2", "gpt2-erf-untied", "llama", "llama-biased-tied", "llama3-scaling", "qwen2", "qwen2-tied"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch):
    # What reaches the disk after a power cut is tested with checkpoints; here it only costs time.
    monkeypatch.setattr("os.fsync", lambda _: None)


def a_checkpoint(name: str, dtype: str = "float32", **changes: Any) -> Checkpoint:
    model = CONFIGS[name]
    params = {key: np.asarray(array).astype(jnp.dtype(dtype)) for key, array in random_params(model).items()}
    values: dict[str, Any] = {
        "path": Path(), "step": 0, "config": model, "stage": "base", "compute_dtype": dtype, "eos_token_ids": [7],
        "tokenizer": None, "template": None, "provenance": {}, "params": params,
    }  # fmt: skip
    return Checkpoint(**{**values, **changes})


def a_folder(out: Path, name: str = "gpt2", dtype: str = "float32") -> Path:
    hf.write(a_checkpoint(name, dtype), out)
    return out


def stock(out: Path, name: str, dtype: str, **save: Any) -> Any:
    """A random stock transformers model saved to `out`."""
    torch.manual_seed(0)
    settings = config.to_hf(CONFIGS[name], dtype)
    kinds: Any = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    model = transformers.AutoModelForCausalLM.from_config(kinds[settings["model_type"]](**settings))
    model = model.to(DTYPES[dtype])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out, **save)
    return model


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def equal_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and torch.equal(a.view(torch.uint8), right[name].view(torch.uint8))
        for name, a in left.items()
    )


# -- There and back ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_an_export_with_nothing_missing_or_left_over(tmp_path: Path, name: str, dtype: str):
    source = a_checkpoint(name, dtype)
    hf.write(source, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=DTYPES[dtype], output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    written = weights.to_hf(source.config, source.params)
    state = {key: tensor for key, tensor in model.state_dict().items() if key in written}
    assert state.keys() == written.keys()
    for key, tensor in state.items():
        bits = torch.from_numpy(written[key].view(np.int16 if dtype == "bfloat16" else np.int32))
        assert torch.equal(tensor.view(bits.dtype), bits), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stock_model_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: str):
    stock(tmp_path / "stock", name, dtype)
    found = hf.read(tmp_path / "stock")
    assert found.config == CONFIGS[name]
    assert found.dtype == dtype
    source = a_checkpoint(name, config=found.config, params=found.params)
    hf.write(source, tmp_path / "out")
    assert equal_tensors(tensors_of(tmp_path / "stock"), tensors_of(tmp_path / "out"))


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path):
    stock(tmp_path / "one", "qwen2", "bfloat16")
    stock(tmp_path / "many", "qwen2", "bfloat16", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = hf.read(tmp_path / "one"), hf.read(tmp_path / "many")
    assert all(same_bits(array, many.params[name]) for name, array in one.params.items())


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_import_and_export_keep_every_bit_through_a_checkpoint(tmp_path: Path, name: str):
    stock(tmp_path / "stock", name, "bfloat16")
    importing.import_model(tmp_path / "stock", tmp_path / "ours")
    hf.export_hf(tmp_path / "ours", tmp_path / "out")
    assert equal_tensors(tensors_of(tmp_path / "stock"), tensors_of(tmp_path / "out"))
    loaded = checkpoint.load(tmp_path / "ours")
    assert loaded.compute_dtype == "bfloat16"
    assert loaded.stage == "base"
    assert config.from_hf(json.loads((tmp_path / "out/config.json").read_text())) == CONFIGS[name]


@pytest.mark.parametrize(
    "both",
    exhaustive_but(
        ("float32 as float16", "float32 as bfloat16", "bfloat16 as float32"),
        [f"{kept} as {dtype}" for kept in ("float32", "bfloat16") for dtype in DTYPES],
    ),
)
def test_an_export_in_another_dtype_is_loaded_as_that_with_rounded_values(both: str, tmp_path: Path):
    kept, dtype = both.split(" as ")
    stock(tmp_path / "stock", "llama", kept)
    importing.import_model(tmp_path / "stock", tmp_path / "ours")
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "hf", "--dtype", dtype]) == 0
    expected = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors_of(tmp_path / "stock").items()}
    assert equal_tensors(expected, tensors_of(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == DTYPES[dtype]
    assert equal_tensors(expected, {name: tensor for name, tensor in model.state_dict().items() if name in expected})


def test_names_without_prefix_and_mask_buffers_are_understood_and_said(tmp_path: Path):
    folder = a_folder(tmp_path / "hub")
    whole = hf.read(folder)

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.uint8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, as_on_the_hub)
    found = hf.read(folder)
    assert all(same_bits(array, found.params[name]) for name, array in whole.params.items())
    assert "dropped 4 constants that are no parameters (h.0.attn.bias, h.0.attn.masked_bias (+2 more))" in found.notices


def test_a_repeated_tied_head_is_dropped_and_said(tmp_path: Path):
    folder = a_folder(tmp_path / "tied", "qwen2-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "dropped lm_head.weight, which repeats model.embed_tokens.weight" in hf.read(folder).notices


def test_the_dtype_is_the_headers_and_never_the_tag(tmp_path: Path):
    folder = a_folder(tmp_path / "hf", "llama", "bfloat16")
    edit_json(folder / "config.json", lambda c: c.update(dtype="float16", torch_dtype="float16"))
    found = hf.read(folder)
    assert found.dtype == "bfloat16"
    assert "config.json says float16, the weights are bfloat16; their own dtype is used" in found.notices


def test_every_end_of_text_id_is_read_from_both_files(tmp_path: Path):
    folder = a_folder(tmp_path / "hf")
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=3))
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=[9, 3, 50256]))
    found = hf.read(folder)
    assert found.eos_token_ids == [3, 9]
    assert "eos_token_id 50256 is outside the vocabulary of 131; ignored" in found.notices


def test_weights_that_are_not_numbers_are_imported_with_a_notice(tmp_path: Path):
    folder = a_folder(tmp_path / "hf")
    edit_tensors(folder, lambda t: t["transformer.ln_f.bias"].fill_(float("nan")))
    assert "1 parameters hold NaN or infinity (first: final_norm.bias)" in hf.read(folder).notices


# -- Tokenizer ---------------------------------------------------------------------------

GPT2_ROWS = dataclasses.replace(CONFIGS["gpt2"], vocab_size=50304, hidden_size=4, head_dim=1, num_hidden_layers=1)


def gpt2_checkpoint(template: str) -> Checkpoint:
    tokenizer = Tokenizer.create("gpt2", template=TEMPLATES[template])
    params = {name: np.asarray(array) for name, array in random_params(GPT2_ROWS).items()}
    return a_checkpoint("gpt2", config=GPT2_ROWS, params=params, tokenizer=tokenizer, template=TEMPLATES[template])


def test_the_exported_tokenizer_gives_transformers_the_same_ids(tmp_path: Path):
    source = gpt2_checkpoint("chatml")
    assert hf.write(source, tmp_path / "out") == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = source.tokenizer
    assert ours is not None
    for text in ("Hello world", " don't  stop\n\n\t", "naïve 日本語 🙂", "1234 == x[5]", ""):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    marked = "<|im_start|>user\nHi<|im_end|><|endoftext|>"
    assert theirs.encode(marked, add_special_tokens=False) == ours.encode(marked, specials=True)
    assert theirs.eos_token_id == 50256


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_a_gpt2_tokenizer_comes_back_with_its_special_tokens(tmp_path: Path, template: str):
    source = gpt2_checkpoint(template)
    hf.write(source, tmp_path / "out")
    found = hf.read(tmp_path / "out")
    assert found.tokenizer is not None
    assert source.tokenizer is not None
    assert found.tokenizer.state() == source.tokenizer.state()
    assert found.template == source.template


# -- Refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", [importing.import_model, hf.export_hf])
def test_an_existing_folder_is_never_written_into(tmp_path: Path, command: Callable[[Path, Path], Any]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="out exists and is not an empty folder; choose another"):
        command(tmp_path / "none", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", full)
    with pytest.raises(InputError, match="out was not written: No space left on device"):
        a_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_without_a_hugging_face_type_is_not_exported(tmp_path: Path):
    strange = dataclasses.replace(CONFIGS["gpt2"], norm="rmsnorm")
    with pytest.raises(InputError, match="no Hugging Face model type"):
        hf.write(a_checkpoint("gpt2", config=strange, params=random_params(strange)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- Dtypes that lie -------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "marked"), [("bfloat16", "F16"), ("float16", "BF16")])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_marked_as_another_dtype_of_16_bits_are_recognised(name: str, kept: str, marked: str, tmp_path: Path):
    folder = a_folder(tmp_path / "out", name, kept)
    assert not any("look like" in notice for notice in hf.read(folder).notices)
    header_of(
        folder,
        lambda header: {
            name: entry | {"dtype": marked} if "dtype" in entry else entry for name, entry in header.items()
        },
    )
    (notice,) = (notice for notice in hf.read(folder).notices if "look like" in notice)
    wrong = {"F16": "float16", "BF16": "bfloat16"}[marked]
    assert f"are marked {wrong}, but their bits look like {kept}: typical magnitude" in notice


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 8.0])
@pytest.mark.parametrize("drawn", ["normal", "uniform", "laplace", "student", "half zeros"])
def test_weights_of_every_usual_spread_are_not_called_mislabelled(drawn: str, spread: float, dtype: str):
    rng = np.random.default_rng(0)
    shape = (90, 70)
    values = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "laplace": rng.laplace(size=shape),
        "student": rng.standard_t(3, shape),
        "half zeros": rng.standard_normal(shape) * (rng.random(shape) < 0.5),
    }[drawn]
    array = (values * spread).astype(jnp.dtype(dtype))
    assert mislabelled({"a": array, "b": array.T}) == ""
    other = {"bfloat16": np.float16, "float16": jnp.bfloat16}[dtype]
    assert "look like" in mislabelled({"a": array.view(other), "b": array.T.view(other)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_one_value_that_is_not_finite_is_seen_in_every_dtype(bad: float, dtype: str, tmp_path: Path):
    params = {name: np.array(array) for name, array in a_checkpoint("llama", dtype).params.items()}
    params["layers.1.mlp.up.kernel"][3, 4] = bad
    hf.write(a_checkpoint("llama", dtype, params=params), tmp_path / "out")
    assert "1 parameters hold NaN or infinity (first: layers.1.mlp.up.kernel)" in hf.read(tmp_path / "out").notices


# -- Settings --------------------------------------------------------------------------


ROPE: dict[str, Any] = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}


@pytest.mark.parametrize("style", ["4", "5"])
@pytest.mark.parametrize("key", ROPE)
def test_a_rope_setting_acts_wherever_the_config_has_its_own(key: str, style: str, tmp_path: Path):
    settings = json.loads((a_folder(tmp_path / "in", "llama") / "config.json").read_text())
    gone = ("rope_parameters",) if style == "4" else ("rope_theta", "rope_scaling")
    (tmp_path / "in/config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in gone}))
    before, found = (hf.read(tmp_path / "in", given).config for given in ({}, {key: ROPE[key]}))
    assert found.rope_theta == (500.0 if key == "rope_theta" else before.rope_theta)
    assert (found.rope_scaling is None) == (key == "rope_theta")
    with pytest.raises(InputError, match="must be a positive number, got 0"):
        hf.read(tmp_path / "in", {key: 0.0 if key == "rope_theta" else {"rope_type": "linear", "factor": 0}})
    with pytest.raises(InputError, match="give one of them"):
        hf.read(tmp_path / "in", {key: ROPE[key], "rope_parameters": {"rope_type": "default"}})


def test_a_setting_that_is_none_of_the_models_is_said_to_be_from_the_command(tmp_path: Path):
    with pytest.raises(InputError, match=r"^config\.json with --set n_heads has keys jaxgpt does not know: n_heads"):
        hf.read(a_folder(tmp_path / "in", "llama"), {"n_heads": 7})


SAID = {"bos_token_id": 3, "pad_token_id": 9, "eos_token_id": 7, "max_window_layers": 1, "use_cache": False}
SAMPLING = {"do_sample": True, "temperature": 0.7, "bos_token_id": 3, "eos_token_id": [7, 8], "pad_token_id": 5}


def test_what_only_other_programs_use_comes_back_with_the_same_values(tmp_path: Path):
    folder = a_folder(tmp_path / "in", "qwen2")
    settings = json.loads((folder / "config.json").read_text()) | SAID
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    importing.import_model(folder, tmp_path / "ours")
    assert checkpoint.load(tmp_path / "ours").eos_token_ids == [7, 8]
    hf.export_hf(tmp_path / "ours", tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == SAMPLING
    both = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out")]
    assert both[0] == both[1] | {"_name_or_path": both[0]["_name_or_path"]}
    assert both[1]["bos_token_id"] == 3


def test_other_stop_ids_than_the_sources_are_written_and_lost_ids_are_not(tmp_path: Path):
    kept = {"hf_config": SAID | {"bos_token_id": 10**6}, "hf_generation_config": SAMPLING}
    hf.write(dataclasses.replace(a_checkpoint("qwen2"), provenance=kept, eos_token_ids=[7]), tmp_path / "out")
    names = ("config.json", "generation_config.json")
    settings, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert settings["eos_token_id"] == generation["eos_token_id"] == 7
    assert "bos_token_id" not in settings
    assert generation["temperature"] == 0.7


def test_transformers_puts_no_ids_of_its_own_into_a_model_without_them(tmp_path: Path):
    assert transformers.AutoConfig.from_pretrained(a_folder(tmp_path / "out", "gpt2")).bos_token_id is None


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or device"):
        importing.read(tmp_path / "pipe", {})
