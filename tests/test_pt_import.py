"""Files of PyTorch training scripts: read without torch, the same function, and nothing in them runs."""

import argparse
import copy
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jaxgpt import checkpoint, lm
from jaxgpt.errors import InputError
from jaxgpt.formats import importing, pt_file

# -- A plain re-implementation of nanoGPT's forward --------------------------------------

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 20, "vocab_size": 37, "dropout": 0.0}


def nano_state(*, bias: bool, seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    """Parameters as nanoGPT's `GPT` names and lays them out: Linear (out, in), biases only where asked for."""
    torch.manual_seed(seed)
    width = SIZES["n_embd"]
    state: OrderedDict[str, torch.Tensor] = OrderedDict()

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        state[f"{name}.weight"] = mean + 0.3 * torch.randn(shape)
        if bias and not name.endswith(("wte", "wpe")):
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])

    add("transformer.wte", SIZES["vocab_size"], width)
    add("transformer.wpe", SIZES["block_size"], width)
    for i in range(SIZES["n_layer"]):
        add(f"transformer.h.{i}.ln_1", width, mean=1.0)
        add(f"transformer.h.{i}.attn.c_attn", 3 * width, width)
        add(f"transformer.h.{i}.attn.c_proj", width, width)
        add(f"transformer.h.{i}.ln_2", width, mean=1.0)
        add(f"transformer.h.{i}.mlp.c_fc", 4 * width, width)
        add(f"transformer.h.{i}.mlp.c_proj", width, 4 * width)
    add("transformer.ln_f", width, mean=1.0)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nano_logits(state: "OrderedDict[str, torch.Tensor]", ids: torch.Tensor) -> torch.Tensor:
    """nanoGPT's forward in float64: pre-norm blocks, exact GELU, tied head. (B, T) → (B, T, V)."""
    p = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p.get(f"{name}.bias"), 1e-5)

    batch, time = ids.shape
    heads, width = SIZES["n_head"], SIZES["n_embd"]
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:time]
    for i in range(SIZES["n_layer"]):
        at = f"transformer.h.{i}"
        packed = linear(f"{at}.attn.c_attn", norm(f"{at}.ln_1", x)).split(width, dim=2)
        q, k, v = (part.view(batch, time, heads, width // heads).transpose(1, 2) for part in packed)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{at}.attn.c_proj", attended.transpose(1, 2).reshape(batch, time, width))
        x = x + linear(f"{at}.mlp.c_proj", F.gelu(linear(f"{at}.mlp.c_fc", norm(f"{at}.ln_2", x))))
    return F.linear(norm("transformer.ln_f", x), p["lm_head.weight"])


def nano_file(path: Path, state: Any, **changes: Any) -> Path:
    """ckpt.pt as nanoGPT's train.py saves it."""
    content = {
        "model": state,
        "optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(),
        "model_args": SIZES | {"bias": False},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.25),
        "config": {"out_dir": "out", "n_head": 999, "learning_rate": 6e-4},
    }
    torch.save(content | changes, path)
    return path


IDS = torch.randint(0, SIZES["vocab_size"], (3, SIZES["block_size"]), generator=torch.Generator().manual_seed(1))


def logits_of(source: Path, out: Path, **settings: Any) -> tuple[np.ndarray, list[str]]:
    notices = importing.import_model(source, out, verify=True, **settings)
    return lm.load(out).logits(IDS.tolist()), notices


def assert_same_function(logits: np.ndarray, state: "OrderedDict[str, torch.Tensor]") -> None:
    """Within float32's rounding of the truth in float64: KL of every token at most 1e-8 nats."""
    truth = F.log_softmax(nano_logits(state, IDS), dim=-1)
    ours = F.log_softmax(torch.from_numpy(np.array(logits)).double(), dim=-1)
    assert float((truth.exp() * (truth - ours)).sum(-1).max()) < 1e-8


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_the_same_function(bias: bool, tmp_path: Path):
    state = nano_state(bias=bias)
    logits, notices = logits_of(nano_file(tmp_path / "ckpt.pt", state), tmp_path / "ours")
    assert_same_function(logits, state)
    assert any("no biases" in notice for notice in notices) == (not bias)
    assert any(notice.startswith("verified: ") for notice in notices)


def test_the_exact_gelu_matters(tmp_path: Path):
    """With GPT-2's tanh form the same file is another function: the activation was not taken by chance."""
    state = nano_state(bias=True)
    file = nano_file(tmp_path / "ckpt.pt", state)
    logits, _ = logits_of(file, tmp_path / "tanh", overrides={"activation_function": "gelu_new"})
    with pytest.raises(AssertionError):
        assert_same_function(logits, state)


# -- Dialects --------------------------------------------------------------------------


def prefixed(state: "OrderedDict[str, torch.Tensor]", prefix: str) -> "OrderedDict[str, torch.Tensor]":
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path):
    state = nano_state(bias=True)
    logits, _ = logits_of(nano_file(tmp_path / "ckpt.pt", prefixed(state, prefix)), tmp_path / "ours")
    assert_same_function(logits, state)


def without_transformer(state: "OrderedDict[str, torch.Tensor]") -> "OrderedDict[str, torch.Tensor]":
    return OrderedDict((name.removeprefix("transformer."), tensor) for name, tensor in state.items())


def with_masks(state: "OrderedDict[str, torch.Tensor]") -> "OrderedDict[str, torch.Tensor]":
    """The buffer of nanoGPT without flash attention."""
    mask = torch.ones(SIZES["block_size"], SIZES["block_size"]).tril()[None, None]
    return OrderedDict([*state.items(), *((f"transformer.h.{i}.attn.bias", mask) for i in range(SIZES["n_layer"]))])


def conv1d(state: "OrderedDict[str, torch.Tensor]") -> "OrderedDict[str, torch.Tensor]":
    """Hugging Face's layout: matrices (in, out)."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return OrderedDict((name, t.T.contiguous() if name.endswith(matrices) else t) for name, t in state.items())


DIALECTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "state_dict at the top": lambda state: dict(state),
    "no `transformer.`": lambda state: {"state_dict": without_transformer(state), "cfg": SIZES},
    "attention masks": lambda state: {"model_state_dict": with_masks(state), "config": {"model": SIZES}},
    "other names of the sizes": lambda state: {
        "model": state, "config": {"num_heads": 3, "d_model": 24, "context_length": 20, "num_layers": 2},
    },
    "Conv1D layout": lambda state: {"model": conv1d(state), "model_args": SIZES | {"hidden_act": "gelu"}},
    "a Parameter each": lambda state: {"model": {n: nn.Parameter(t) for n, t in state.items()}, "cfg": SIZES},
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_scripts_files_are_the_same_function(dialect: str, tmp_path: Path):
    state = nano_state(bias=True)
    torch.save(DIALECTS[dialect](state), tmp_path / "model.pt")
    overrides = {"n_head": 3} if dialect == "state_dict at the top" else {}
    logits, _ = logits_of(tmp_path / "model.pt", tmp_path / "ours", overrides=overrides)
    assert_same_function(logits, state)


def test_the_number_of_heads_is_asked_for_and_any_of_its_names_is_taken(tmp_path: Path):
    state = nano_state(bias=True)
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"does not say its number of attention heads; give it with --set n_head=12"):
        importing.read(tmp_path / "bare.pt", {})
    assert importing.read(tmp_path / "bare.pt", {"num_heads": 3}).config.num_attention_heads == 3


def test_a_reward_head_is_dropped_and_said(tmp_path: Path):
    state = nano_state(bias=True)
    heads = {"reward_head.weight": torch.ones(1, 24), "module.value_head.bias": torch.ones(1)}
    file = nano_file(tmp_path / "rm.pt", OrderedDict([*state.items(), *heads.items()]))
    logits, notices = logits_of(file, tmp_path / "ours")
    assert_same_function(logits, state)
    assert "dropped reward head: module.value_head.bias, reward_head.weight" in notices


def test_an_untied_head_stays_untied(tmp_path: Path):
    state = nano_state(bias=True)
    state["lm_head.weight"] = torch.randn(37, 24)
    logits, _ = logits_of(nano_file(tmp_path / "ckpt.pt", state), tmp_path / "ours")
    assert_same_function(logits, state)
    assert checkpoint.load(tmp_path / "ours").config.tie_word_embeddings is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_storages(dtype: torch.dtype, tmp_path: Path):
    state = OrderedDict((name, tensor.to(dtype)) for name, tensor in nano_state(bias=True).items())
    importing.import_model(nano_file(tmp_path / "ckpt.pt", state), tmp_path / "ours", verify=True)
    loaded = checkpoint.load(tmp_path / "ours")
    assert {f"torch.{array.dtype}" for array in loaded.params.values()} == {str(dtype)}
    expected = state["transformer.wte.weight"].float().numpy()
    np.testing.assert_array_equal(loaded.params["embed.tokens.weight"].astype(np.float32), expected)


def test_a_vocabulary_of_gpt2s_size_gets_gpt2s_tokenizer(tmp_path: Path):
    state = nano_state(bias=False)
    state["lm_head.weight"] = state["transformer.wte.weight"] = torch.zeros(50304, 24)
    found = importing.read(nano_file(tmp_path / "ckpt.pt", state, model_args={"n_head": 3}), {})
    assert found.tokenizer is not None
    assert (found.tokenizer.kind, found.eos_token_ids) == ("gpt2", [50256])
    small = importing.read(nano_file(tmp_path / "small.pt", nano_state(bias=False)), {})
    assert small.tokenizer is None
    assert any("no tokenizer imported: a .pt file has none" in notice for notice in small.notices)


def test_a_folder_with_one_file_is_that_file_and_one_with_two_is_asked_about(tmp_path: Path):
    nano_file(tmp_path / "ckpt.pt", nano_state(bias=True))
    assert importing.read(tmp_path, {}).config.hidden_size == 24
    nano_file(tmp_path / "ckpt2.pt", nano_state(bias=True))
    with pytest.raises(InputError, match=r"has 2 \.pt files \(ckpt\.pt, ckpt2\.pt\); give one of them"):
        importing.read(tmp_path, {})


def test_a_checkpoint_is_not_imported_again(tmp_path: Path):
    importing.import_model(nano_file(tmp_path / "ckpt.pt", nano_state(bias=True)), tmp_path / "ours")
    with pytest.raises(InputError, match="ours is a jaxgpt checkpoint already; every command takes it as it is"):
        importing.import_model(tmp_path / "ours", tmp_path / "again")


def test_verify_finds_one_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = nano_file(tmp_path / "ckpt.pt", nano_state(bias=True))
    load = checkpoint.load

    def with_a_flipped_bit(path: Path) -> Any:
        loaded = load(path)
        array = np.array(loaded.params["layers.1.mlp.down.kernel"])
        array.view(np.uint32)[3, 4] ^= 1
        loaded.params["layers.1.mlp.down.kernel"] = array
        return loaded

    monkeypatch.setattr(checkpoint, "load", with_a_flipped_bit)
    with pytest.raises(InputError, match=r"differs from .* in 1 tensors \(first: transformer\.h\.1\.mlp\.c_proj\.wei"):
        importing.import_model(file, tmp_path / "ours", verify=True)


@pytest.mark.parametrize("verify", [False, True])
def test_progress_is_in_bytes_that_only_grow_and_ends_with_all_of_them(verify: bool, tmp_path: Path):
    file = nano_file(tmp_path / "ckpt.pt", nano_state(bias=True))
    told: list[tuple[int, int]] = []
    importing.import_model(file, tmp_path / "ours", verify=verify, progress=lambda *now: told.append(now))
    size = sum(array.nbytes for array in checkpoint.load(tmp_path / "ours").params.values())
    done, totals = [now[0] for now in told], {now[1] for now in told}
    # Written and hashed; to verify, read from the source and read back as well.
    assert totals == {size * (4 if verify else 2)}
    assert done == sorted(done)
    assert done[-1] == max(totals)
    assert len(set(done)) > 5


# -- Hostile files ---------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the file ran its own code')",))


def archive(path: Path, program: bytes, files: dict[str, bytes] | None = None, *, compress: bool = False) -> Path:
    """A zip like torch.save's, around any pickle."""
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as out:
        out.writestr("archive/data.pkl", program)
        for name, content in (files or {}).items():
            out.writestr(f"archive/{name}", content)
    return path


def saved(content: Any) -> bytes:
    """A file of torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pickled(content: bytes) -> bytes:
    """A file around opcodes."""
    return b"\x80\x02" + content + b"."


def a_tensor(*, dtype: str = "FloatStorage", numel: int = 4, offset: int = 0, size: Any = (4,), stride: Any = (1,)):
    """Opcodes that rebuild one tensor of storage 0."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.description if isinstance(obj, Storage) else None

    class Call:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

    storage: Any = Storage()
    storage.description = ("storage", getattr(torch, dtype), "0", "cpu", numel)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Call()})
    return buffer.getvalue()


FLOATS = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


def test_the_tensor_of_these_tests_is_read_where_it_does_not_lie(tmp_path: Path):
    """The control: what is refused below is refused for its lie alone."""
    read = pt_file.read(archive(tmp_path / "a.pt", a_tensor(), FLOATS))
    np.testing.assert_array_equal(read["w"], np.arange(4, dtype=np.float32))


LIES: dict[str, tuple[bytes, dict[str, bytes], str]] = {
    "more numbers than the file has": (a_tensor(numel=2**40, size=(2**40,)), FLOATS, "has 16 bytes, for 1,099,511"),
    "a view past the storage": (a_tensor(size=(5,)), FLOATS, r"size \[5\] in a storage of 4 numbers"),
    "an offset past the storage": (a_tensor(offset=1), FLOATS, r"size \[4\] in a storage of 4 numbers"),
    "a stride past the storage": (a_tensor(stride=(2,)), FLOATS, r"size \[4\] in a storage of 4 numbers"),
    "a stride of zero, repeated": (a_tensor(size=(9,), stride=(0,)), FLOATS, r"size \[9\] in a storage of 4"),
    "a negative stride": (a_tensor(stride=(-1,)), FLOATS, "offset, size and stride"),
    "a negative offset": (a_tensor(offset=-1), FLOATS, "offset, size and stride"),
    "a size that is text": (a_tensor(size=("4",)), FLOATS, "offset, size and stride"),
    "sizes without strides": (a_tensor(size=(2, 2)), FLOATS, "2 sizes and 1 strides"),
    "thirty sizes": (a_tensor(size=(1,) * 30, stride=(1,) * 30), FLOATS, "30 sizes and 30 strides"),
    "a tensor that is not there": (a_tensor(), {}, r"lacks data/0, which a tensor needs"),
    "another dtype": (a_tensor(dtype="DoubleStorage"), FLOATS, "has 16 bytes, for 4 numbers of float64"),
    "big-endian numbers": (a_tensor(), FLOATS | {"byteorder": b"big"}, "holds big-endian numbers"),
}


@pytest.mark.parametrize("lie", LIES)
def test_tensors_that_lie_are_refused(lie: str, tmp_path: Path):
    program, files, message = LIES[lie]
    with pytest.raises(InputError, match=message):
        pt_file.read(archive(tmp_path / "a.pt", program, files))


BOMBS: dict[str, tuple[bytes, str]] = {
    "code": (saved({"model": Evil()}), r"needs arbitrary code to load \((__builtin__|builtins)\.exec\); refused"),
    "a function of os": (saved({"x": Path("a")}), r"needs arbitrary code to load \(pathlib\._local|\(pathlib\."),
    "a Namespace": (saved({"args": argparse.Namespace(a=1)}), r"\(argparse\.Namespace\); refused\. Where it comes"),
    "an instance (INST)": (pickled(b"(ios\nsystem\n"), "pickle opcode INST"),
    "a getattr through dots": (
        pickled(b"ctorch\n_utils._rebuild_tensor_v2\n"),
        r"\(torch\._utils\._rebuild_tensor_v2\)",
    ),
    "an extension (EXT1)": (pickled(b"\x82\x01"), "pickle opcode EXT1"),
    "a memo index of 4 billion": (pickled(b"Nr\xff\xff\xff\x7f"), "skips memo entries"),
    "a memo entry that is not there": (pickled(b"h\x05"), "is damaged"),
    "an empty stack": (pickled(b"0"), "pickle opcode POP|is damaged"),
    "a call of a dict": (pickled(b"})R"), "is damaged"),
    "attributes set on a function": (pickled(b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aNsb"), "is damaged"),
    "slots set on a function": (
        pickled(b"ccollections\nOrderedDict\nN}X\x04\x00\x00\x00_runNs\x86b"),
        "state set on _Func",
    ),
    "attributes set on a dtype": (pickled(b"ctorch\nFloatStorage\n}X\x01\x00\x00\x00aNsb"), "is damaged"),
    "text longer than the file": (pickled(b"X\xff\xff\xff\x7fa"), "damaged pickle"),
    "bytes longer than memory": (pickled(b"\x8d" + b"\xff" * 7 + b"\x7fa"), "damaged pickle"),
    "a number of a million digits": (pickled(b"L" + b"9" * 10**6 + b"L\n"), "pickle opcode LONG|damaged pickle"),
    "a million lists in each other": (pickled(b"]" * 10**6 + b"a" * (10**6 - 1)), "more than 1,000,000 steps"),
    "a pickle of 5 MB": (pickled(b"(" + b"N" * (5 << 20) + b"l"), r"has 5,242,\d\d\d bytes; a model's has at most"),
    "a persistent id that is text": (pickled(b"X\x01\x00\x00\x00aQ"), "is damaged"),
    "no end": (b"\x80\x02}", "damaged pickle"),
    "nothing": (b"", "damaged pickle"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_are_programs_or_bombs_are_refused_in_one_line(bomb: str, tmp_path: Path):
    content, message = BOMBS[bomb]
    file = tmp_path / "a.pt"
    if content[:2] == b"PK":
        file.write_bytes(content)
    else:
        archive(file, content)
    with pytest.raises(InputError, match=message) as refused:
        pt_file.read(file)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path):
    file = archive(tmp_path / "a.pt", pickled(b"N"), {"data/0": b"\0" * 10**7}, compress=True)
    assert file.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"is compressed, which torch\.save never does; refused"):
        pt_file.read(file)


def test_a_central_directory_that_points_elsewhere_is_refused(tmp_path: Path):
    file = archive(tmp_path / "a.pt", a_tensor(), FLOATS)
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of data/0, the last one
    content[entry + 42 : entry + 46] = struct.pack("<I", 7)
    file.write_bytes(content)
    with pytest.raises(InputError, match="data/0 has no header where the directory says"):
        pt_file.read(file)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    whole = saved({"model": nano_state(bias=True)})
    for end in [*range(0, len(whole), math.ceil(len(whole) / 60)), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"is not a file of torch\.save, or cut short"):
            pt_file.read(tmp_path / "cut.pt")


def test_a_flipped_byte_is_refused_or_lies_where_nothing_is_read(tmp_path: Path):
    """Every 97th byte in turn: never another exception than ours, and never other weights."""
    whole = saved({"model": nano_state(bias=True), "model_args": SIZES})
    (tmp_path / "whole.pt").write_bytes(whole)
    expected = importing.read(tmp_path / "whole.pt", {}).params
    refused = 0
    for at in range(0, len(whole), 97):
        content = bytearray(whole)
        content[at] ^= 0x55
        (tmp_path / "flipped.pt").write_bytes(content)
        try:
            found = importing.read(tmp_path / "flipped.pt", {}).params
        except InputError:
            refused += 1
            continue
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert refused > len(whole) / 97 / 2


def test_the_old_format_is_refused_with_the_way_to_convert_it(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        InputError, match=r"before 1\.6, which is not read; convert it where torch is installed: python"
    ):
        pt_file.read(tmp_path / "old.pt")


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensors": (lambda c: {"epoch": 3}, "has no tensors under model, model_state_dict, state_dict or at its top"),
    "a list": (lambda c: [1, 2], "holds a list; expected a dict of tensors"),
    "another architecture": (lambda c: {"model": {"encoder.weight": torch.ones(2, 2)}}, "only GPT-2's architecture"),
    "a missing tensor": (
        lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight") is None or c,
        r"lacks 1 of \d+ tensors \(first: transformer\.h\.1\.mlp\.c_fc\.weight\)",
    ),
    "another size": (lambda c: c["model_args"].update(n_layer=3) or c, r"has n_layer=3, its tensors say 2; correct it"),
    "heads that do not divide": (lambda c: c["model_args"].update(n_head=5) or c, "not a multiple of n_head=5"),
    "no embedding": (lambda c: c["model"].pop("transformer.wte.weight") is None or c, r"wte\.weight is missing"),
    "one name twice": (
        lambda c: c["model"].update({"module.lm_head.weight": torch.ones(37, 24)}) or c,
        r"has lm_head\.weight twice, with and without a prefix",
    ),
    "integers": (
        lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(24, dtype=torch.int32)}) or c,
        r"transformer\.ln_f\.weight is int32; jaxgpt reads float32, bfloat16, float16",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_no_gpt2_says_what_is_wrong(wrong: str, tmp_path: Path):
    change, message = WRONG[wrong]
    content = {"model": copy.copy(nano_state(bias=True)), "model_args": dict(SIZES)}
    torch.save(change(content), tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        importing.import_model(tmp_path / "a.pt", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_settings_are_json_where_they_can_be():
    words = ["n_head=12", "activation_function=gelu", "rope_scaling=null", "a=b=c"]
    assert importing.settings_of(words) == {
        "n_head": 12, "activation_function": "gelu", "rope_scaling": None, "a": "b=c",
    }  # fmt: skip
    with pytest.raises(InputError, match="--set takes KEY=VALUE, got 'n_head'"):
        importing.settings_of(["n_head"])
