"""Files of PyTorch training scripts: read without torch, the same function, and nothing in them runs."""

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile_pt import FLOATS, a_tensor, archive, saved
from nano_files import SIZES, nano_file, nano_state
from often import exhaustive_but
from torch import nn

from jaxgpt import checkpoint
from jaxgpt.errors import InputError
from jaxgpt.formats import importing, pt_file
from jaxgpt.loading import load

# -- A plain re-implementation of nanoGPT's forward --------------------------------------


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


IDS = torch.randint(0, SIZES["vocab_size"], (3, SIZES["block_size"]), generator=torch.Generator().manual_seed(1))


def logits_of(source: Path, out: Path, **settings: Any) -> tuple[np.ndarray, list[str]]:
    notices = importing.import_model(source, out, verify=True, **settings)
    return load(out).logits(IDS.tolist()), notices


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


@pytest.mark.parametrize(
    "prefix",
    exhaustive_but(
        ("module.", "_orig_mod.module._orig_mod."),
        ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module._orig_mod."),
    ),
)
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


def test_a_setting_that_does_not_exist_is_refused_and_not_passed_over(tmp_path: Path):
    torch.save(nano_state(bias=True), tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"^--set act is no setting of a \.pt file; its settings are activation_func"):
        importing.read(tmp_path / "bare.pt", {"num_heads": 3, "act": "gelu_new"})


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


@pytest.mark.parametrize(
    "dtype", exhaustive_but((torch.bfloat16, torch.float16), [torch.bfloat16, torch.float16, torch.float32])
)
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


def test_the_tensor_of_these_tests_is_read_where_it_does_not_lie(tmp_path: Path):
    """The control: what is refused below is refused for its lie alone."""
    read = pt_file.read(archive(tmp_path / "a.pt", a_tensor(), FLOATS))
    np.testing.assert_array_equal(read["w"], np.arange(4, dtype=np.float32))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    whole = saved({"model": nano_state(bias=True)})
    for end in [*range(0, len(whole), math.ceil(len(whole) / 60)), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"is not a file of torch\.save, or cut short"):
            pt_file.read(tmp_path / "cut.pt")


def test_a_flipped_byte_is_refused_or_lies_where_nothing_is_read(tmp_path: Path):
    """Every 193rd byte in turn: never another exception than ours, and never other weights."""
    whole = saved({"model": nano_state(bias=True), "model_args": SIZES})
    (tmp_path / "whole.pt").write_bytes(whole)
    expected = importing.read(tmp_path / "whole.pt", {}).params
    refused = 0
    for at in range(0, len(whole), 193):
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
    assert refused > len(whole) / 193 / 2


def test_settings_are_json_where_they_can_be():
    words = ["n_head=12", "activation_function=gelu", "rope_scaling=null", "a=b=c"]
    assert importing.settings_of(words) == {
        "n_head": 12, "activation_function": "gelu", "rope_scaling": None, "a": "b=c",
    }  # fmt: skip
    with pytest.raises(InputError, match="--set takes KEY=VALUE, got 'n_head'"):
        importing.settings_of(["n_head"])
