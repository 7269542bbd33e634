"""`jaxgpt inspect` on files and folders of other programs: names, shapes and dtypes without reading values."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import small_vocabularies as small
import torch
from hostile_weights import edit_json
from nano_files import nano_file, nano_state
from test_hf_format import a_folder

from jaxgpt import cli
from jaxgpt.formats import hf_weights, safetensors_file

WEIGHT = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 0.02


def seen(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    """What the command prints as JSON."""
    assert cli.main(["inspect", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_training_file_shows_its_tensors_and_the_settings_it_carries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = nano_file(tmp_path / "ckpt.pt", nano_state(bias=True))
    assert cli.main(["inspect", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["model.transformer.wte.weight", "37×24", "float32"] for line in lines)
    told = dict(line.split(maxsplit=1) for line in lines if line.startswith("settings."))
    assert told["settings.model_args.n_layer"] == "2"
    assert told["settings.iter_num"] == "7"
    assert told["settings.best_val_loss"] == "1.25"
    assert told["settings.config.learning_rate"] == "0.0006"
    found = seen(capsys, file)
    assert found["settings"]["config.out_dir"] == "out"
    assert found["parameters"]["model.transformer.wpe.weight"] == {"shape": [20, 24], "dtype": "float32"}


FILES: dict[str, Callable[[Path, Any], None]] = {
    "a.pt": lambda path, tensors: torch.save(tensors, path),
    "a.bin": lambda path, tensors: torch.save(tensors, path),
    "a.safetensors": lambda path, tensors: safetensors.torch.save_file(tensors, path, {"made": "here"}),
    "without an ending": lambda path, tensors: torch.save(tensors, path),
}


@pytest.mark.parametrize(
    ("name", "in_folder"),
    [(name, in_folder) for name in FILES for in_folder in (False, True) if "." in name or not in_folder],
)
def test_a_file_alone_or_in_a_folder_shows_its_tensors(
    name: str, in_folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors = {"w": WEIGHT, "ids": torch.arange(6), "mask": torch.ones(2, 2, dtype=torch.bool)}
    FILES[name](tmp_path / name, tensors)
    place = tmp_path if in_folder else tmp_path / name
    found = seen(capsys, place)
    assert (found["tensor_count"], found["value_count"], found["alarms"]) == (3, 970, 0)
    assert found["parameters"]["ids"] == {"shape": [6], "dtype": "int64"}
    assert found["path"] == str(tmp_path / name)
    statistics = seen(capsys, place, "--tensors")["parameters"]
    assert statistics["w"]["std"] == pytest.approx(float(WEIGHT.std()), rel=0.01)
    assert statistics["ids"]["first"] == [0, 1, 2, 3]
    assert statistics["mask"]["mean"] == 1


def test_values_are_read_only_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A byte of a tensor is changed: its checksum, and the NaN that it makes, are seen with --tensors alone."""
    file, safe = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"w": WEIGHT}, file)
    with zipfile.ZipFile(file) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(file.read_bytes())
    content[entry.header_offset + 500] ^= 1
    file.write_bytes(content)
    assert seen(capsys, file)["parameters"]["w"] == {"shape": [40, 24], "dtype": "float32"}
    assert cli.main(["inspect", str(file), "--tensors"]) == 2
    assert "data/0 fails its CRC-32" in capsys.readouterr().err
    safetensors.torch.save_file({"w": WEIGHT.clone().fill_(float("nan"))}, safe)
    assert seen(capsys, safe)["alarms"] == 0
    assert seen(capsys, safe, "--tensors", code=1)["parameters"]["w"]["alarm"] == "960 values are NaN or infinity"


def test_a_folder_of_several_files_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"w": WEIGHT}, tmp_path / "a.pt")
    torch.save({"w": WEIGHT}, tmp_path / "b.bin")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "has 2 files (a.pt, b.bin); give one of them" in capsys.readouterr().err


def test_a_file_of_nothing_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes").write_text("some text")
    assert cli.main(["inspect", str(tmp_path / "notes")]) == 2
    assert "notes is no file of tensors; give .pt, .pth, .bin, .ckpt, .safetensors, .gguf or" in capsys.readouterr().err


def test_the_tokenizer_of_a_folder_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = a_folder(tmp_path / "hf", "llama")
    small.as_json(folder, "qwen2")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert rows < 700  # that vocabulary does not fit; only its refusal names both numbers
    assert cli.main(["inspect", str(folder)]) == 2
    assert f"tokenizer has 705 tokens, model embeds {rows}" in capsys.readouterr().err

    tensors = safetensors.torch.load_file(folder / hf_weights.WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name]] * 8)[:768].contiguous()
    safetensors.torch.save_file(tensors, folder / hf_weights.WEIGHTS)
    edit_json(folder / "config.json", lambda c: c.update(vocab_size=768))
    assert cli.main(["inspect", str(folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tokenizer", "hf,", "705", "tokens"] in lines
    assert ["end", "702", "<|im_end|>"] in lines
    assert seen(capsys, folder)["tokenizer"]["specials"]["end_of_text"] == {"text": "<|endoftext|>", "id": 700}


# -- Bits under another dtype ----------------------------------------------------------


def as_pt(folder: Path, wrong: torch.Tensor) -> Path:
    torch.save({"model": {"w": wrong}}, folder / "a.pt")
    return folder / "a.pt"


def as_safetensors(folder: Path, wrong: torch.Tensor) -> Path:
    safetensors.torch.save_file({"w": wrong}, folder / "a.safetensors")
    return folder / "a.safetensors"


def as_gguf(folder: Path, wrong: torch.Tensor) -> Path:
    kind = gguf.GGMLQuantizationType.F16 if wrong.dtype == torch.float16 else gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    writer.add_tensor("w", wrong.view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def as_folder(folder: Path, wrong: torch.Tensor, *, torch_file: bool = False) -> Path:
    a_folder(folder / "hf", "llama", "bfloat16")
    file = folder / "hf" / hf_weights.WEIGHTS
    tensors = {
        name: tensor.to(torch.float16 if wrong.dtype == torch.bfloat16 else torch.bfloat16).view(wrong.dtype)
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(tensors, file)
    if torch_file:
        torch.save(tensors, file.with_name(hf_weights.PT_WEIGHTS))
        file.unlink()
    return folder / "hf"


INPUTS: dict[str, Callable[[Path, torch.Tensor], Path]] = {
    "a .pt file": as_pt,
    "a folder with one": lambda folder, wrong: as_pt(folder, wrong).parent,
    "a .safetensors file": as_safetensors,
    "a GGUF file": as_gguf,
    "a Hugging Face folder": as_folder,
    "a Hugging Face folder of pytorch_model.bin": lambda folder, wrong: as_folder(folder, wrong, torch_file=True),
}


@pytest.mark.parametrize("marked", ["float16", "bfloat16"])
@pytest.mark.parametrize("given", INPUTS)
def test_16_bits_under_the_other_dtype_are_an_alarm(
    given: str, marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept = {"float16": torch.bfloat16, "bfloat16": torch.float16}[marked]
    place = INPUTS[given](tmp_path, WEIGHT.to(kept).view(getattr(torch, marked)))
    assert cli.main(["inspect", str(place)]) == 1
    told = capsys.readouterr()
    (alarm,) = (line for line in (told.out + told.err).splitlines() if "look like" in line)
    assert alarm.startswith("ALARM: ")
    assert f"are marked {marked}, but their bits look like {str(kept).removeprefix('torch.')}" in alarm
    assert seen(capsys, place, code=1)["mislabelled"] == alarm.removeprefix("ALARM: ")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("given", [as_pt, as_safetensors, as_gguf])
def test_16_bits_under_their_own_dtype_are_none(
    given: Callable[[Path, torch.Tensor], Path], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert seen(capsys, given(tmp_path, WEIGHT.to(getattr(torch, dtype))))["mislabelled"] is None


def test_every_dtype_of_safetensors_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Those that torch has no arrays of in numpy too."""
    dtypes = {"F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16}
    header, data = {}, b""
    for name, dtype in {**dtypes, "U64": np.uint64, "I16": np.int16}.items():
        values = np.array([1, 2, 3], dtype).tobytes()
        header[name] = {"dtype": name, "shape": [3], "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = seen(capsys, tmp_path, "--tensors")["parameters"]
    assert {entry["mean"] for entry in found.values()} == {2}
    assert found["F8_E4M3"]["dtype"] == "float8_e4m3fn"
    assert safetensors_file.metadata(tmp_path / "a.safetensors") == {}
