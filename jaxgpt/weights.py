"""THE name table: our parameter, its Hugging Face and GGUF names, and the layout between.

Parameters are one flat dict, `{"layers.0.attn.q.kernel": array}`; the names are
the taps' module names plus `weight`, `kernel` or `bias`. Hugging Face is the
pivot. Only here does a layout change: `to_ours` and `from_ours` are written side
by side, and because an inverse pair hides symmetric mistakes, tests anchor the
table to stock transformers models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig, hf_model_type
from jaxgpt.errors import InputError, first


@dataclass(frozen=True)
class Parameter:
    """One of our arrays and where it lives in other programs."""

    name: str
    """Ours, e.g. `layers.0.attn.q.kernel`."""
    shape: tuple[int, ...]
    """Ours: kernels are (in, out), embeddings (V, D)."""
    hf: str
    """The tensor of the Hugging Face file."""
    gguf: str
    """The tensor of the GGUF file."""
    transposed: bool = False
    """The Hugging Face tensor is (out, in): torch's Linear, not Conv1D."""
    part: tuple[int, int] | None = None
    """(index, count): ours is one equal part of the tensor's last axis (GPT-2's c_attn)."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor of the file as this parameter (a view where possible)."""
        if self.part is not None:
            index, count = self.part
            tensor = np.split(tensor, count, axis=-1)[index]
        return tensor.T if self.transposed else tensor

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the Hugging Face file."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape if self.part is None else (*shape[:-1], shape[-1] * self.part[1])


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model, in execution order.

    A config that has no Hugging Face type still has parameters; their foreign
    names are then empty, and `hf_model_type` says why on export.
    """
    shapes = _shapes(config)
    try:
        table = _GPT2 if hf_model_type(config) == "gpt2" else _LLAMA
    except InputError:
        return tuple(Parameter(name, shape, "", "") for name, shape in shapes.items())
    return tuple(_row(table, name, shape) for name, shape in shapes.items())


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    c = config
    D, F, V = c.hidden_size, c.intermediate_size, c.vocab_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.tokens.weight": (V, D)}
    if c.position_embedding == "learned":
        shapes["embed.positions.weight"] = (c.max_position_embeddings, D)

    def norm(at: str) -> None:
        shapes[f"{at}.weight"] = (D,)
        if c.norm == "layernorm":
            shapes[f"{at}.bias"] = (D,)

    def linear(at: str, inputs: int, outputs: int, bias: bool) -> None:
        shapes[f"{at}.kernel"] = (inputs, outputs)
        if bias:
            shapes[f"{at}.bias"] = (outputs,)

    for i in range(c.num_hidden_layers):
        norm(f"layers.{i}.attn_norm")
        linear(f"layers.{i}.attn.q", D, q, c.qkv_bias)
        linear(f"layers.{i}.attn.k", D, kv, c.qkv_bias)
        linear(f"layers.{i}.attn.v", D, kv, c.qkv_bias)
        if c.qk_norm:
            shapes[f"layers.{i}.attn.q_norm.weight"] = shapes[f"layers.{i}.attn.k_norm.weight"] = (c.head_dim,)
        linear(f"layers.{i}.attn.out", q, D, c.attention_output_bias)
        norm(f"layers.{i}.mlp_norm")
        if c.gated_mlp:
            linear(f"layers.{i}.mlp.gate", D, F, c.mlp_bias)
        linear(f"layers.{i}.mlp.up", D, F, c.mlp_bias)
        linear(f"layers.{i}.mlp.down", F, D, c.mlp_bias)
    norm("final_norm")
    if not c.tie_word_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


# module: (Hugging Face module, GGUF module, part of the tensor or None)
_Table = Mapping[str, tuple[str, str, tuple[int, int] | None]]
_GPT2: _Table = {
    "embed.tokens": ("transformer.wte", "token_embd", None),
    "embed.positions": ("transformer.wpe", "position_embd", None),
    "attn_norm": ("transformer.h.{i}.ln_1", "blk.{i}.attn_norm", None),
    "attn.q": ("transformer.h.{i}.attn.c_attn", "blk.{i}.attn_qkv", (0, 3)),
    "attn.k": ("transformer.h.{i}.attn.c_attn", "blk.{i}.attn_qkv", (1, 3)),
    "attn.v": ("transformer.h.{i}.attn.c_attn", "blk.{i}.attn_qkv", (2, 3)),
    "attn.out": ("transformer.h.{i}.attn.c_proj", "blk.{i}.attn_output", None),
    "mlp_norm": ("transformer.h.{i}.ln_2", "blk.{i}.ffn_norm", None),
    "mlp.up": ("transformer.h.{i}.mlp.c_fc", "blk.{i}.ffn_up", None),
    "mlp.down": ("transformer.h.{i}.mlp.c_proj", "blk.{i}.ffn_down", None),
    "final_norm": ("transformer.ln_f", "output_norm", None),
    "head": ("lm_head", "output", None),
}
_LLAMA: _Table = {
    "embed.tokens": ("model.embed_tokens", "token_embd", None),
    "attn_norm": ("model.layers.{i}.input_layernorm", "blk.{i}.attn_norm", None),
    "attn.q": ("model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q", None),
    "attn.k": ("model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k", None),
    "attn.v": ("model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v", None),
    "attn.q_norm": ("model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm", None),
    "attn.k_norm": ("model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm", None),
    "attn.out": ("model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output", None),
    "mlp_norm": ("model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm", None),
    "mlp.gate": ("model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate", None),
    "mlp.up": ("model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up", None),
    "mlp.down": ("model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down", None),
    "final_norm": ("model.norm", "output_norm", None),
    "head": ("lm_head", "output", None),
}


def _row(table: _Table, name: str, shape: tuple[int, ...]) -> Parameter:
    module, leaf = name.rsplit(".", 1)
    layer = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
    hf, gguf, part = table[module]
    suffix = "bias" if leaf == "bias" else "weight"
    # GPT-2 stores Conv1D weights (in, out), as we do; everyone else Linear (out, in).
    transposed = leaf == "kernel" and table is not _GPT2
    return Parameter(
        name=name,
        shape=shape,
        hf=f"{hf.format(i=layer)}.{suffix}",
        gguf=f"{gguf.format(i=layer)}.{suffix}",
        transposed=transposed,
        part=part,
    )


def check_bijection(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a set of Hugging Face tensors that is not exactly this model's.

    Raises:
        InputError: every missing, left-over and misshapen tensor, in one line; or
            the config has no Hugging Face type, and so no names to compare.
    """
    hf_model_type(config)
    expected = {p.hf: p.hf_shape for p in parameters(config)}
    missing = [name for name in expected if name not in shapes]
    extra = sorted(name for name in shapes if name not in expected)
    misshapen = [
        f"{name} is {list(shapes[name])}, model {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    problems: list[str] = []
    if missing:
        problems.append(f"lacks {len(missing)} of {len(expected)} tensors (first: {first(missing)})")
    if extra:
        problems.append(f"has {len(extra)} tensors the model does not (first: {first(extra)})")
    if misshapen:
        problems.append(f"has {len(misshapen)} misshapen tensors ({first(misshapen)})")
    if problems:
        raise InputError("the weights file " + "; ".join(problems))


def from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face tensors as our flat parameters, after `check_bijection`."""
    check_bijection(config, {name: tensor.shape for name, tensor in tensors.items()})
    return {p.name: p.to_ours(tensors[p.hf]) for p in parameters(config)}


def to_hf(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our flat parameters as Hugging Face tensors; the exact inverse of `from_hf`.

    Raises:
        InputError: the config has no Hugging Face type.
    """
    return dict(hf_tensors(config, params))


def hf_tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """As `to_hf`, one tensor at a time, so that a large model need not be there twice."""
    hf_model_type(config)
    parts: dict[str, list[Parameter]] = {}
    for parameter in parameters(config):
        parts.setdefault(parameter.hf, []).append(parameter)
    for name, rows in parts.items():
        arrays = [np.asarray(params[row.name]) for row in rows]
        # The table lists a tensor's parts in order, so concatenation is the inverse of the split.
        whole = np.concatenate([array.T if rows[0].transposed else array for array in arrays], axis=-1)
        yield name, np.ascontiguousarray(whole)


# -- GGUF ------------------------------------------------------------------------------


def gguf_architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture that computes this config: gpt2, qwen2, qwen3 or llama.

    `llama` is its most general one: any bias may be there or not. `qwen2` and `qwen3`
    read no factors of llama3 scaling.

    Raises:
        InputError: llama.cpp has none, naming the fields that fit none.
    """
    c = config
    if c.position_embedding == "learned" and c.norm == "layernorm" and not c.gated_mlp and not c.qk_norm:
        square = c.num_key_value_heads == c.num_attention_heads and c.head_dim * c.num_attention_heads == c.hidden_size
        if square and c.hidden_act in ("gelu_new", "gelu") and c.sliding_window is None:
            return "gpt2"
    if c.position_embedding == "rope" and c.norm == "rmsnorm" and c.gated_mlp and c.hidden_act == "silu":
        plain_rope = c.rope_scaling is None or c.rope_scaling.rope_type != "llama3"
        unbiased = not (c.attention_output_bias or c.mlp_bias)
        if not c.qk_norm:
            return "qwen2" if c.qkv_bias and unbiased and plain_rope else "llama"
        if unbiased and not c.qkv_bias and plain_rope:
            return "qwen3"
    fields = (
        *("position_embedding", "norm", "gated_mlp", "hidden_act", "qk_norm", "sliding_window"),
        *("qkv_bias", "attention_output_bias", "mlp_bias", "hidden_size", "num_attention_heads", "head_dim"),
    )
    raise InputError(
        "llama.cpp has no architecture (gpt2, llama, qwen2, qwen3) that computes this model: "
        + ", ".join(f"{name}={getattr(c, name)}" for name in fields)
        + f", rope_scaling={c.rope_scaling and c.rope_scaling.rope_type}"
    )


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file: whole parameters, one after the other along the first axis."""

    name: str
    shape: tuple[int, ...]
    """In numpy's order, (out, in); the file's own order is the reverse."""
    parts: tuple[Parameter, ...]
    """None where the model lacks what llama.cpp needs: zeros."""
    paired_heads: int = 0
    """Heads in which rows i and i + H/2, which RoPE rotates together, become neighbours; 0 leaves rows alone."""

    def of(self, params: Mapping[str, Any]) -> np.ndarray:
        """The tensor, a view of the one parameter where possible."""
        if not self.parts:
            return np.zeros(self.shape, np.float32)
        arrays = [np.asarray(params[p.name]) for p in self.parts]
        arrays = [array.T if p.name.endswith(".kernel") else array for p, array in zip(self.parts, arrays, strict=True)]
        tensor = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if not self.paired_heads:
            return tensor
        halves = tensor.reshape(self.paired_heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)


def gguf_tensors(config: ModelConfig) -> tuple[GGUFTensor, ...]:
    """Every tensor of parameters in a GGUF file, in execution order; raises as `gguf_architecture` does."""
    architecture = gguf_architecture(config)
    shapes = _shapes(config)
    parts: dict[str, list[Parameter]] = {}
    for name, shape in shapes.items():
        row = _row(_GPT2 if architecture == "gpt2" else _LLAMA, name, shape)
        parts.setdefault(row.gguf, []).append(row)
        bias = f"{name.removesuffix('kernel')}bias"
        if architecture == "gpt2" and name.endswith(".kernel") and bias not in shapes:
            parts.setdefault(row.gguf.removesuffix("weight") + "bias", [])
    return tuple(_gguf_tensor(config, architecture, name, rows) for name, rows in parts.items())


def _gguf_tensor(config: ModelConfig, architecture: str, name: str, rows: list[Parameter]) -> GGUFTensor:
    if not rows:
        module = name.split(".")[-2]
        widths = {"attn_qkv": 3 * config.hidden_size, "ffn_up": config.intermediate_size}
        return GGUFTensor(name, (widths.get(module, config.hidden_size),), ())
    shape = rows[0].shape[::-1] if rows[0].name.endswith(".kernel") else rows[0].shape
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    # llama.cpp rotates neighbours for `llama`, and halves of a head, as we do, for all others.
    paired = heads.get(name.split(".")[-2], 0) if architecture == "llama" else 0
    return GGUFTensor(name, (shape[0] * len(rows), *shape[1:]), tuple(rows), paired)
