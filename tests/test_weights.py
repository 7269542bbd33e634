"""The name table: every tensor once, in the right place, and a wrong place is seen."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import conftest
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import flops, model, weights
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.presets import PRESETS

forward = jax.jit(model.forward, static_argnums=0)
Tensors = dict[str, np.ndarray]


def numbered(config: ModelConfig) -> Tensors:
    """Hugging Face tensors in which every element is another number."""
    shapes = {p.hf: p.hf_shape for p in weights.parameters(config)}
    start, tensors = 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        start += size
    return tensors


# -- Bijection -------------------------------------------------------------------------


def test_from_hf_and_to_hf_are_inverse_and_lose_no_element(config: ModelConfig):
    tensors = numbered(config)
    ours = weights.from_hf(config, tensors)
    back = weights.to_hf(config, ours)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    every = np.concatenate([array.ravel() for array in ours.values()])
    assert np.array_equal(np.sort(every), np.arange(every.size))


def test_an_exported_tensor_is_contiguous_and_of_the_parameters_dtype(config: ModelConfig):
    params = {name: array.astype(np.float16) for name, array in conftest.random_params(config).items()}
    for name, tensor in weights.to_hf(config, params).items():
        assert tensor.flags.c_contiguous, name
        assert tensor.dtype == np.float16, name


def test_the_parts_of_c_attn_are_q_then_k_then_v():
    config = conftest.GPT2
    width = config.hidden_size
    kernel = np.zeros((width, 3 * width))
    bias = np.zeros(3 * width)
    for number in range(3):
        kernel[:, number * width : (number + 1) * width] = bias[number * width : (number + 1) * width] = number + 1
    at = "transformer.h.1.attn.c_attn"
    ours = weights.from_hf(config, {**numbered(config), f"{at}.weight": kernel, f"{at}.bias": bias})
    for number, name in enumerate("qkv"):
        assert (ours[f"layers.1.attn.{name}.kernel"] == number + 1).all()
        assert (ours[f"layers.1.attn.{name}.bias"] == number + 1).all()


def test_linear_weights_are_transposed_and_conv1d_weights_are_not():
    for name, config in conftest.CONFIGS.items():
        for p in weights.parameters(config):
            assert p.transposed == (p.name.endswith(".kernel") and not name.startswith("gpt2")), (name, p.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")],
            "the weights file lacks 2 of 21 tensors (first: model.norm.weight, lm_head.weight)",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(1), "a.bias": np.zeros(1)}),
            "the weights file has 2 tensors the model does not (first: a.bias, model.layers.2.mlp.up_proj.weight)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros((1, 42))}),
            "the weights file has 1 misshapen tensors (model.norm.weight is [1, 42], model [42])",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": np.zeros((84, 42))}),
            "(model.layers.0.self_attn.o_proj.weight is [84, 42], model [42, 84])",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_listed(change: Callable[[Tensors], Any], message: str):
    tensors = numbered(conftest.LLAMA)
    change(tensors)
    with pytest.raises(InputError) as caught:
        weights.from_hf(conftest.LLAMA, tensors)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_told_together():
    tensors = {name.replace("mlp", "ffn"): array for name, array in numbered(conftest.LLAMA).items()}
    tensors["model.norm.weight"] = np.zeros(41)
    with pytest.raises(InputError, match=r"lacks 6 of 21 .*has 6 tensors .*has 1 misshapen .* is \[41\], model \[42\]"):
        weights.from_hf(conftest.LLAMA, tensors)


@settings(deadline=None)
@given(st.data())
def test_any_set_of_tensors_but_the_models_own_is_refused(data: st.DataObject):
    config = conftest.CONFIGS[data.draw(st.sampled_from(sorted(conftest.CONFIGS)))]
    shapes: dict[str, tuple[int, ...]] = {p.hf: p.hf_shape for p in weights.parameters(config)}
    weights.check_bijection(config, shapes)
    name = data.draw(st.sampled_from(sorted(shapes)))
    kind = data.draw(st.sampled_from(["lost", "renamed", "reshaped"]))
    if kind == "reshaped":
        shape = data.draw(st.lists(st.integers(0, 140), max_size=3).map(tuple).filter(lambda s: s != shapes[name]))
        shapes[name] = shape
    else:
        shape = shapes.pop(name)
        if kind == "renamed":
            shapes[data.draw(st.text().filter(lambda text: text not in shapes and text != name))] = shape
    with pytest.raises(InputError) as caught:
        weights.check_bijection(config, shapes)
    assert str(caught.value).isprintable()


def test_an_architecture_without_a_hugging_face_type_is_refused_by_name_and_not_as_missing_tensors():
    config = dataclasses.replace(conftest.LLAMA, norm="layernorm")
    assert all(not p.hf and not p.gguf for p in weights.parameters(config))
    for call in (lambda: weights.from_hf(config, {}), lambda: weights.to_hf(config, {})):
        with pytest.raises(InputError, match="no Hugging Face model type"):
            call()


# -- Names -----------------------------------------------------------------------------


def test_every_name_is_unique_and_only_c_attn_is_shared(config: ModelConfig):
    table = weights.parameters(config)
    assert len({p.name for p in table}) == len(table)
    for foreign in ([(p.hf, p.part) for p in table], [(p.gguf, p.part) for p in table]):
        assert max(Counter(foreign).values()) == 1
    shared = {p.hf for p in table if p.part is not None}
    assert len({p.hf for p in table}) == len(table) - 2 * len(shared)
    assert {p.hf for p in table if p.gguf.endswith(("attn_qkv.weight", "attn_qkv.bias"))} == shared


GGUF = {
    "gpt2": {
        *("token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"),
        *(f"blk.0.{name}.{leaf}" for name in ("attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down")
          for leaf in ("weight", "bias")),
    },
    "qwen2": {
        *("token_embd.weight", "output_norm.weight", "output.weight"),
        *(f"blk.0.attn_{name}.{leaf}" for name in "qkv" for leaf in ("weight", "bias")),
        *(f"blk.0.{name}.weight" for name in
          ("attn_norm", "ffn_norm", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_gguf_names_are_those_llama_cpp_reads(name: str):
    one_layer = dataclasses.replace(conftest.CONFIGS[name], num_hidden_layers=1)
    assert {p.gguf for p in weights.parameters(one_layer)} == GGUF[name]


# -- Wrong places ----------------------------------------------------------------------

LAYERS = "model.layers.0"


def swapped(tensors: Tensors, left: str, right: str) -> Tensors:
    return {**tensors, left: tensors[right], right: tensors[left]}


def thirds(tensors: Tensors, order: tuple[int, int, int]) -> Tensors:
    at = "transformer.h.0.attn.c_attn.weight"
    parts = np.split(tensors[at], 3, axis=-1)
    return {**tensors, at: np.concatenate([parts[number] for number in order], axis=-1)}


FAULTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "q and k of c_attn": ("gpt2", lambda t: thirds(t, (1, 0, 2))),
    "k and v of c_attn": ("gpt2", lambda t: thirds(t, (0, 2, 1))),
    "the norms of a layer": (
        "llama",
        lambda t: swapped(t, f"{LAYERS}.input_layernorm.weight", f"{LAYERS}.post_attention_layernorm.weight"),
    ),
    "k and v": (
        "llama",
        lambda t: swapped(t, f"{LAYERS}.self_attn.k_proj.weight", f"{LAYERS}.self_attn.v_proj.weight"),
    ),
    "gate and up": ("llama", lambda t: swapped(t, f"{LAYERS}.mlp.gate_proj.weight", f"{LAYERS}.mlp.up_proj.weight")),
    "embedding and head": ("llama", lambda t: swapped(t, "model.embed_tokens.weight", "lm_head.weight")),
    "the same matrix of two layers": (
        "llama",
        lambda t: swapped(t, f"{LAYERS}.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ),
    "a square matrix not transposed": (
        "llama-square",
        lambda t: {**t, f"{LAYERS}.self_attn.q_proj.weight": t[f"{LAYERS}.self_attn.q_proj.weight"].T},
    ),
    "q and o, both square": (
        "llama-square",
        lambda t: swapped(t, f"{LAYERS}.self_attn.q_proj.weight", f"{LAYERS}.self_attn.o_proj.weight"),
    ),
}
"""Faults that no shape betrays."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_table_that_no_shape_betrays_moves_the_logits(fault: str):
    name, plant = FAULTS[fault]
    config = conftest.CONFIGS[name]
    params, ids = conftest.random_params(config), conftest.random_ids(config, 2, 12)
    right = np.asarray(forward(config, params, ids).logits)
    planted = weights.from_hf(config, plant(weights.to_hf(config, params)))
    wrong = np.asarray(forward(config, planted, ids).logits)
    assert np.abs(right - wrong).max() > 1000 * conftest.rounding(right)


# -- Counting --------------------------------------------------------------------------


def test_parameter_counts_are_the_published_ones():
    # GPT-2: 124,439,808 with 50,257 rows, and 47 padded rows more here.
    assert flops.parameter_count(PRESETS["gpt2"]) == 124_439_808 + 47 * 768
    assert flops.parameter_count(PRESETS["qwen2-0.5b"]) == 494_032_768
    assert flops.parameter_count(PRESETS["llama3-8b"]) == 8_030_261_248


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biased-tied"])
def test_flops_are_those_of_every_matrix_product_done_forward_and_twice_backward(name: str):
    c = conftest.CONFIGS[name]
    mlp = (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    products = c.num_hidden_layers * (mlp + 2 * c.hidden_size * (queries + keys)) + c.vocab_size * c.hidden_size
    attention = c.num_hidden_layers * 2 * queries * 10  # q·k and weights·v over 10 tokens
    assert flops.flops_per_token(c, 10) == 6 * (products + attention)


def test_the_peak_is_known_by_the_devices_name_and_of_no_cpu():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA L4") == 121e12
    assert flops.peak("cpu") is None
