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

from jaxgpt import checkpoint, config, weights
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError
from jaxgpt.formats import hf, hf_weights, importing, safetensors_file
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


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / hf.WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / hf.WEIGHTS, {"format": "pt"})


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


def test_an_export_may_be_cast(tmp_path: Path):
    stock(tmp_path / "stock", "llama", "float32")
    importing.import_model(tmp_path / "stock", tmp_path / "ours")
    hf.export_hf(tmp_path / "ours", tmp_path / "out", cast="bfloat16")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(tmp_path / "stock").items()}
    assert equal_tensors(expected, tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


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


def index(folder: Path, weight_map: Any) -> None:
    (folder / hf.WEIGHTS).rename(folder / "a.safetensors")
    (folder / hf_weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def header_of(folder: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the header of the weights file, as anyone can."""
    path = folder / hf.WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    text = json.dumps(change(content) or content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def lie_about_size(folder: Path) -> None:
    huge = {"dtype": "F32", "shape": [2**41], "data_offsets": [0, 2**43]}
    (folder / hf.WEIGHTS).write_bytes(b"")
    text = json.dumps({"transformer.wte.weight": huge}).encode()
    (folder / hf.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(1000))


FIRST = "transformer.wte.weight"
NORM0, NORM1 = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read (No such file or directory)"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "model type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="mamba")),
        "model_type 'mamba'; jaxgpt reads gpt2, llama, mistral, qwen2, qwen3",
    ),
    "a billion layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_layer=10**9)),
        "config.json has num_hidden_layers=1,000,000,000, model.safetensors has 28 tensors",
    ),
    "no weights": (
        lambda f: (f / hf.WEIGHTS).unlink(),
        "has no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, ",
    ),
    "missing tensors": (
        lambda f: edit_tensors(f, lambda t: [t.pop(n) for n in list(t) if ".h.1." in n and "bias" in n] and None),
        "model.safetensors lacks 6 of 28 tensors (first: transformer.h.1.ln_1.bias, transformer.h.1.attn.c_attn.bias",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(3))),
        "model.safetensors has 1 tensors the model does not (first: extra)",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: torch.ones(130, 36)})),
        "has 1 misshapen tensors (transformer.wte.weight is [130, 36], model [131, 36])",
    ),
    "another tied head": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(131, 36)})),
        "lm_head.weight differs from transformer.wte.weight, but config.json ties them",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: torch.ones(131, 36, dtype=torch.int8)})),
        "tensor transformer.wte.weight is int8; jaxgpt reads float32, bfloat16, float16",
    ),
    "path escape": (
        lambda f: index(f, {FIRST: "../x.safetensors"}),
        "index names ../x.safetensors, outside the model directory; refused",
    ),
    "absolute path": (
        lambda f: index(f, {FIRST: "/etc/passwd"}),
        "index names /etc/passwd, outside the model directory; refused",
    ),
    "a name no file has": (
        lambda f: index(f, {FIRST: "a\0b"}),
        "index names a\0b, outside the model directory; refused",
    ),
    "index with a name that no file can have": (
        lambda folder: index(folder, {"transformer.wte.weight": "x" * 10_000}),
        " cannot be read: File name too long",
    ),
    "a pipe": (
        lambda f: ((f / hf.WEIGHTS).unlink(), os.mkfifo(f / hf.WEIGHTS)),
        "model.safetensors is a folder, pipe or device, not a file; give",
    ),
    "a number of 5,000 digits": (
        lambda f: (f / hf.WEIGHTS).write_bytes((5000).to_bytes(8, "little") + b"9" * 5000),
        "model.safetensors is no safetensors file: its header is not JSON",
    ),
    "index without map": (lambda f: index(f, 3), "has no weight_map from tensors to files"),
    "index of other tensors": (lambda f: index(f, {"x": "a.safetensors"}), "and a.safetensors disagree on 29 tensors"),
    "shard missing": (
        lambda f: index(f, {FIRST: "b.safetensors"}),
        "b.safetensors cannot be read: No such file or directory",
    ),
    "size bomb": (lie_about_size, "header declares 8 TiB, file is 1 KB; refused"),
    "header longer than the file": (
        lambda f: (f / hf.WEIGHTS).write_bytes((2**43).to_bytes(8, "little") + bytes(1016)),
        "header declares 8 TiB, file is 1.02 KB; refused",
    ),
    "empty": (lambda f: (f / hf.WEIGHTS).write_bytes(b""), "file is 0 bytes; refused"),
    "truncated": (
        lambda f: (f / hf.WEIGHTS).write_bytes((f / hf.WEIGHTS).read_bytes()[:-1]),
        "; refused",
    ),
    "bytes at the end": (
        lambda f: (f / hf.WEIGHTS).write_bytes((f / hf.WEIGHTS).read_bytes() + b"x"),
        "; refused",
    ),
    "header no JSON": (
        lambda f: (f / hf.WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"{" * 8),
        "model.safetensors is no safetensors file: its header is not JSON",
    ),
    "pickle": (
        lambda f: (f / hf.WEIGHTS).write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00" + bytes(100)),
        "header declares",
    ),
    "shape and bytes disagree": (
        lambda f: header_of(f, lambda h: h[FIRST].update(shape=[131, 35])),
        "does not fill its bytes",
    ),
    "overlapping tensors": (
        lambda f: header_of(f, lambda h: h[NORM0].update(data_offsets=h[NORM1]["data_offsets"])),
        "does not begin where the one before ends; refused",
    ),
    "negative shape": (lambda f: header_of(f, lambda h: h[FIRST].update(shape=[-131, -36])), "does not fill its bytes"),
    "unknown dtype": (
        lambda f: header_of(f, lambda h: h[FIRST].update(dtype="F33")),
        "tensor transformer.wte.weight is not described as safetensors does; refused",
    ),
    "eos a string": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(eos_token_id="</s>")),
        "eos_token_id must be an integer or a list of them, got '</s>'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, case: str):
    folder = a_folder(tmp_path / "hf")
    break_it, message = REFUSED[case]
    break_it(folder)
    with pytest.raises(InputError) as caught:
        importing.import_model(folder, tmp_path / "ours")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_a_tensor_named_twice_is_refused(tmp_path: Path):
    folder = a_folder(tmp_path / "hf")
    data = (folder / hf.WEIGHTS).read_bytes()
    (folder / hf.WEIGHTS).write_bytes(data.replace(b'"transformer.wpe.weight"', b'"transformer.wte.weight"', 1))
    with pytest.raises(InputError, match="safetensors header has 'transformer.wte.weight' twice; keep one of them"):
        hf.read(folder)


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
