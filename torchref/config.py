"""Hugging Face's config.json of GPT-2, Llama, Mistral, Qwen2 and Qwen3, read strictly.

A key that is neither understood nor known to change nothing is refused: a
reference that ignores what it does not know is no reference.
"""

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class LoadError(ValueError):
    """A folder or config that this reference cannot represent exactly; the message is one line."""


def listed(names: list[str], shown: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 under Hugging Face's names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: str
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    initializer_range: float


@dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotary embedding; `kind` is default, linear, llama3 or yarn."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LlamaConfig:
    """Llama, Mistral, Qwen2 and Qwen3 under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    activation: str
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    """Of every layer; None where all that came before is attended to."""
    tie_word_embeddings: bool
    initializer_range: float


Config = GPT2Config | LlamaConfig


def read(raw: Mapping[str, Any]) -> Config:
    """The config of a config.json written by transformers 4 or 5.

    Raises:
        LoadError: an unknown model type or key, a missing or unusable value.
    """
    keys = _Keys(raw)
    model_type = keys.take("model_type", None)
    if model_type == "gpt2":
        config = _gpt2(keys)
    elif model_type in ("llama", "mistral", "qwen2", "qwen3"):
        config = _llama(keys, model_type)
    else:
        known = "gpt2, llama, mistral, qwen2 and qwen3"
        raise LoadError(f"config.json has model_type {reprlib.repr(model_type)}; torchref reads {known}")
    keys.finish()
    return config


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

# Other programs' bookkeeping, dropout (this reference never trains) and heads that are not built here.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "embd_pdrop", "eos_token_id", "id2label", "is_decoder", "label2id", "max_position_embeddings",
    "max_window_layers", "n_ctx", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "sliding_window", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_ONLY_VALUE: Mapping[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_encoder_decoder": False,
    "use_sliding_window": False,
}


_LARGEST = 1 << 28
"""Of a size: the bytes of a matrix of two such still fit a 64-bit integer."""


class _Keys:
    """Values of a JSON object; what nobody took is refused at the end."""

    def __init__(self, raw: Mapping[str, Any], name: str = "config.json"):
        self.raw, self.name = raw, name
        self.left = set(raw)

    def take(self, key: str, default: Any) -> Any:
        self.left.discard(key)
        return self.raw.get(key, default)

    def _given(self, key: str, default: float | None) -> Any:
        value = self.take(key, default)
        if value is not None:
            return value
        if default is None:
            raise LoadError(f"{self.name} lacks {key}")
        return default  # null means the default, as in transformers

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer that tensors can have; without a default, the key must be there."""
        value = self._given(key, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            wanted = "a positive integer" if type(value) is not int or value < 1 else f"at most {_LARGEST:,}"
            raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; expected {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; without a default, the key must be there."""
        value = self._given(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; expected a positive number")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number, or None where the key is missing or null."""
        return None if self.take(key, None) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; expected true or false")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; torchref knows {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def table(self, key: str) -> Mapping[str, Any] | None:
        """An object, or None where the key is missing or null."""
        value = self.take(key, None)
        if not isinstance(value, dict | None):
            raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; expected an object")
        return value

    def finish(self) -> None:
        """Refuse keys nobody took, and values that mean another model."""
        for key, only in _ONLY_VALUE.items():
            value = self.take(key, None) if key in self.left else None
            if value is not None and value != only:
                raise LoadError(f"{self.name} has {key}={reprlib.repr(value)}; torchref implements {only!r} only")
        unknown = sorted(self.left - _WITHOUT_EFFECT)
        if unknown:
            raise LoadError(f"{self.name} has keys torchref does not know: {listed(unknown)}")


def _multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of:
        raise LoadError(f"config.json has {name}={value}, which is not a multiple of {of_name}={of}")


def _gpt2(keys: _Keys) -> GPT2Config:
    width, heads = keys.size("n_embd"), keys.size("n_head")
    _multiple("n_embd", width, "n_head", heads)
    return GPT2Config(
        vocab_size=keys.size("vocab_size"),
        n_positions=keys.size("n_positions"),
        n_embd=width,
        n_layer=keys.size("n_layer"),
        n_head=heads,
        n_inner=keys.size("n_inner", 4 * width),
        activation=keys.activation("activation_function", "gelu_new"),
        layer_norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        initializer_range=keys.number("initializer_range", 0.02),
    )


def _llama(keys: _Keys, model_type: str) -> LlamaConfig:
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = _kv_heads(keys, heads, model_type)
    _multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = _head_dim(keys, width, heads, model_type)
    layers = keys.size("num_hidden_layers")
    # Qwen2's biases are part of its code, not of its config: a key that a type does not read is refused as unknown.
    bias = model_type == "qwen2" or (model_type in ("llama", "qwen3") and keys.flag("attention_bias", False))
    return LlamaConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=width,
        intermediate_size=keys.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        activation=keys.activation("hidden_act", "silu"),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=_rope(keys, model_type),
        qkv_bias=bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and keys.flag("mlp_bias", False),
        qk_norm=model_type == "qwen3",
        sliding_window=_window(keys, model_type, layers),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        initializer_range=keys.number("initializer_range", 0.02),
    )


_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""Where the key is missing; Llama has one per query head."""


def _kv_heads(keys: _Keys, heads: int, model_type: str) -> int:
    """Null means one per query head; a missing key means the type's own number."""
    missing = "num_key_value_heads" not in keys.raw
    return keys.size("num_key_value_heads", _KV_HEADS.get(model_type, heads) if missing else heads)


def _head_dim(keys: _Keys, width: int, heads: int, model_type: str) -> int:
    if model_type == "qwen3":
        head_dim = keys.size("head_dim", None if "head_dim" in keys.raw else 128)
    else:
        if keys.raw.get("head_dim") is None:
            _multiple("hidden_size", width, "num_attention_heads", heads)
        head_dim = keys.size("head_dim", max(1, width // heads))
    _multiple("head_dim", head_dim, "the pair size of RoPE", 2)
    if heads * head_dim > _LARGEST:
        raise LoadError(
            f"config.json has {heads} heads of dimension {head_dim}; expected at most {_LARGEST:,} together"
        )
    return head_dim


FULL, SLIDING = "full_attention", "sliding_attention"


def _window(keys: _Keys, model_type: str, layers: int) -> int | None:
    """The sliding window, which all layers must share.

    Mistral has one in every layer unless it is null. Qwen's are off unless switched on, and
    then in the layers that `layer_types`, or else `max_window_layers`, says. Llama has none.
    """
    window, begins = None, 0
    if model_type == "mistral" and keys.raw.get("sliding_window", 4096) is not None:
        window = keys.size("sliding_window", 4096)
    elif model_type in ("qwen2", "qwen3") and keys.flag("use_sliding_window", False):
        if keys.raw.get("sliding_window", 4096) is not None:
            window = keys.size("sliding_window", 4096)
        begins = keys.take("max_window_layers", 28)
        if type(begins) is not int or begins < 0:
            raise LoadError(f"config.json has max_window_layers={reprlib.repr(begins)}; expected a number of layers")
    usual = [SLIDING if window is not None and layer >= begins else FULL for layer in range(layers)]
    kinds = keys.take("layer_types", None) or usual
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise LoadError(f"config.json has layer_types={reprlib.repr(kinds)}; torchref knows {FULL} and {SLIDING}")
    if len(set(kinds)) != 1 or (window is None and SLIDING in kinds) or (model_type == "mistral" and kinds != usual):
        raise LoadError("config.json has layer_types of which some slide; torchref has one window for all layers")
    return window if kinds[0] == SLIDING else None


_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
"""Where max_position_embeddings is missing."""


def _rope(keys: _Keys, model_type: str) -> Rope:
    """`rope_parameters` (transformers 5) wins over `rope_theta` and `rope_scaling` (4)."""
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    theta = keys.number("rope_theta", 10000.0)
    scaling = _Keys(new or old or {}, "config.json's rope scaling")
    theta = scaling.number("rope_theta", theta)
    legacy = scaling.take("type", "default")
    kind = scaling.take("rope_type", legacy)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", scaling.number("factor"))
    elif kind == "llama3":
        rope = _llama3(theta, scaling)
    elif kind == "yarn":
        rope = _yarn(theta, scaling, keys.size("max_position_embeddings", _CONTEXT[model_type]))
    else:
        raise LoadError(
            f"config.json has rope type {reprlib.repr(kind)}; torchref implements default, linear, llama3 and yarn"
        )
    scaling.finish()
    return rope


def _yarn(theta: float, scaling: _Keys, context: int) -> Rope:
    rope = Rope(
        theta,
        "yarn",
        factor=scaling.number("factor"),
        original_max_position_embeddings=scaling.size("original_max_position_embeddings", context),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.optional("attention_factor"),
        mscale=scaling.optional("mscale"),
        mscale_all_dim=scaling.optional("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )
    if rope.factor < 1 or rope.beta_fast <= rope.beta_slow or theta <= 1:
        raise LoadError(
            "config.json has a yarn rope scaling whose factor is below 1, whose beta_fast is not above beta_slow, "
            "or whose rope_theta is not above 1"
        )
    return rope


def _llama3(theta: float, scaling: _Keys) -> Rope:
    rope = Rope(
        theta,
        "llama3",
        factor=scaling.number("factor"),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_max_position_embeddings=scaling.size("original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise LoadError("config.json has a llama3 rope scaling whose high_freq_factor is not above low_freq_factor")
    return rope
