"""Hugging Face folders whose weights torch.save wrote: the same model as transformers reads there, or refused."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_hf_format import DTYPES, same_bits, stock

from jaxgpt.errors import InputError
from jaxgpt.formats import hf, hf_weights, importing
from jaxgpt.loading import load

IDS = torch.randint(0, 127, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def as_bin(folder: Path, name: str, dtype: str, *, shards: int = 1) -> Path:
    """A stock model whose weights are pytorch_model.bin, or so many shards of it; no safetensors."""
    model = stock(folder, name, dtype)
    (folder / hf_weights.WEIGHTS).unlink()
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / hf_weights.PT_WEIGHTS)
        return folder
    names = list(state)
    files = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    for n, file in enumerate(files):
        torch.save(OrderedDict((name, state[name].clone()) for name in names[n::shards]), folder / file)
    index = {"metadata": {}, "weight_map": {name: files[n % shards] for n, name in enumerate(names)}}
    (folder / hf_weights.PT_INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama3-scaling", "qwen2-tied"])
def test_logits_are_those_of_transformers(name: str, shards: int, tmp_path: Path):
    folder = as_bin(tmp_path / "hf", name, "float32", shards=shards)
    notices = importing.import_model(folder, tmp_path / "ours", verify=True)
    assert notices[-1].startswith("verified: ")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        truth = theirs(IDS).logits.double().log_softmax(-1)
    found = torch.from_numpy(np.array(load(tmp_path / "ours").logits(IDS.tolist()))).double().log_softmax(-1)
    assert float((truth.exp() * (truth - found)).sum(-1).max()) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_the_storages_and_the_values_those_of_safetensors(dtype: str, tmp_path: Path):
    stock(tmp_path / "safe", "qwen2", dtype)
    safe = hf.read(tmp_path / "safe")
    found = hf.read(as_bin(tmp_path / "bin", "qwen2", dtype))
    assert found.dtype == dtype
    assert found.params.keys() == safe.params.keys()
    assert all(same_bits(array, found.params[name]) for name, array in safe.params.items())


def test_safetensors_win_where_both_are_there(tmp_path: Path):
    folder = as_bin(tmp_path / "hf", "llama", "float32")
    before = {name: np.array(array) for name, array in hf.read(folder).params.items()}
    torch.save({"what": "ever"}, folder / hf_weights.PT_WEIGHTS)
    with pytest.raises(InputError, match="holds other things than tensors by name"):
        hf.read(folder)
    stock(folder, "llama", "float32")
    assert all(same_bits(array, before[name]) for name, array in hf.read(folder).params.items())


def test_the_file_alone_is_not_a_model(tmp_path: Path):
    folder = as_bin(tmp_path / "hf", "llama", "float32")
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds tensors without all that a model needs; give its"):
        importing.read(folder / hf_weights.PT_WEIGHTS, {})


def change(edit: Callable[[Any], Any], file: str = hf_weights.PT_WEIGHTS) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = torch.load(folder / file)
        torch.save(edit(content) or content, folder / file)

    return changed


def index(**weight_map: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        content = json.loads((folder / hf_weights.PT_INDEX).read_text())
        content["weight_map"] |= weight_map
        (folder / hf_weights.PT_INDEX).write_text(json.dumps(content))

    return written


def old_format(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / hf_weights.PT_WEIGHTS, _use_new_zipfile_serialization=False)


NORM, SECOND = "model.norm.weight", "pytorch_model-00002-of-00003.bin"
REFUSED: dict[str, tuple[int, Callable[[Path], None], str]] = {
    "a tensor less": (1, change(lambda c: c.pop(NORM) is None), "pytorch_model.bin lacks 1 of "),
    "a tensor more": (1, change(lambda c: c.update(x=torch.ones(1))), "has 1 tensors the model does not (first: x)"),
    "integers": (1, change(lambda c: c.update({NORM: torch.ones(3, dtype=torch.int64)})), f"{NORM} is int64; jaxgpt"),
    "a list": (1, change(lambda c: [1]), "pytorch_model.bin holds a list; expected a dict of tensors"),
    "nothing": (1, change(lambda c: c.clear()), "pytorch_model.bin holds no tensors; "),
    "a training file": (1, change(lambda c: {"model": c}), "(first: model: _Dict); a training script's file"),
    "code": (1, change(lambda c: {"a": Path("x")}), "needs arbitrary code to load (pathlib."),
    "torch before 1.6": (1, old_format, "in the format of torch before 1.6, which is not read; convert it where torch"),
    "a shard outside": (3, index(**{NORM: "../x.bin"}), "index names ../x.bin, outside the model directory; refused"),
    "a shard that is not there": (3, lambda f: (f / SECOND).unlink(), f"{SECOND} cannot be read: No such file"),
    "the index lacks one": (3, change(lambda c: c.update(x=torch.ones(1)), SECOND), f"and {SECOND} disagree on 1"),
    "the index has one more": (3, index(x=SECOND), f"bin.index.json and {SECOND} disagree on 1 tensors (first: x)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exactly_the_model_is_refused_in_one_line(case: str, tmp_path: Path):
    shards, break_it, message = REFUSED[case]
    folder = as_bin(tmp_path / "hf", "llama", "float32", shards=shards)
    break_it(folder)
    with pytest.raises(InputError) as refused:
        importing.import_model(folder, tmp_path / "ours")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ours").exists()
