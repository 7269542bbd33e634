"""One model config: Llama-style Hugging Face names, framework-free.

Architectures differ in fields, never in a name: GPT-2, Llama, Mistral, Qwen2 and
Qwen3 are points of the same space. `from_hf` and `to_hf` translate Hugging Face's
config.json (transformers 4 and 5) strictly: a key that is neither understood nor
known to be harmless is refused, because a key that is ignored is a model that is
wrong without saying so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt import field_checks, rope_scaling
from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened
from jaxgpt.hf_keys import ACTIVATION_NAMES, GPT2_NAMES, HARMLESS, REQUIRED_VALUES
from jaxgpt.rope_scaling import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Every field changes the model's output.

    Raises:
        InputError: at construction, for values that no model can have.
    """

    vocab_size: int
    """V: rows of the embedding, padded rows included."""
    hidden_size: int
    """D: width of the residual stream."""
    intermediate_size: int
    """F: width of the MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    """N: query heads."""
    num_key_value_heads: int
    """K: key/value heads; query head n reads kv head n // (N // K)."""
    head_dim: int
    """H: need not be D / N."""
    max_position_embeddings: int
    """The context limit in tokens."""
    position_embedding: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    rms_norm_eps: float = 1e-5
    """Epsilon inside the norm's square root, whichever kind of norm."""
    hidden_act: Literal["gelu_new", "gelu", "silu"] = "gelu_new"
    """`gelu_new` is the tanh approximation (GPT-2), `gelu` is exact (nanoGPT)."""
    gated_mlp: bool = False
    """down(act(gate(x)) * up(x)) instead of down(act(up(x)))."""
    qkv_bias: bool = True
    attention_output_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    """Each head of queries and keys is normalised, with one weight (H,) for all heads, before RoPE (Qwen3)."""
    sliding_window: int | None = None
    """How many tokens each token attends to, itself included; None for all before it (Mistral)."""
    tie_word_embeddings: bool = True
    """The head is the token embedding."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    embd_pdrop: float = 0.0
    """Dropout after the embedding, in training only."""
    attn_pdrop: float = 0.0
    """Dropout of attention weights, in training only."""
    resid_pdrop: float = 0.0
    """Dropout of each residual branch, in training only."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            field_checks.size(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            field_checks.one_of(name, getattr(self, name), choices)
        for name in _SWITCHES:
            field_checks.switch(name, getattr(self, name))
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            field_checks.rate(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            field_checks.positive(name, getattr(self, name))
        if self.sliding_window is not None:
            field_checks.size("sliding_window", self.sliding_window)
        scaling: Any = self.rope_scaling
        if not isinstance(scaling, RopeScaling | None):
            raise InputError(f"rope_scaling must be null or an object with rope_type, got {shortened(scaling)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise InputError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise InputError(f"rope_theta must exceed 1 for yarn scaling, got {self.rope_theta}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; raises InputError for unknown or missing keys."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, values.keys() - fields.keys()))
        if unknown:
            raise InputError(f"model config has unknown keys {first(unknown)}; this version knows {len(fields)} fields")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise InputError(f"model config lacks {first(missing)}")
        plain = dict(values)
        if isinstance(plain.get("rope_scaling"), Mapping):
            plain["rope_scaling"] = RopeScaling.from_dict(plain["rope_scaling"])
        return cls(**plain)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_SWITCHES = (
    "gated_mlp",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "tie_word_embeddings",
)
_CHOICES = {
    "position_embedding": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "hidden_act": ("gelu_new", "gelu", "silu"),
}


LLAMA_STYLE: dict[str, Any] = {
    "position_embedding": "rope",
    "norm": "rmsnorm",
    "hidden_act": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
}
"""The fields in which Llama-class models differ from GPT-2."""
QWEN2_STYLE: dict[str, Any] = LLAMA_STYLE | {"qkv_bias": True}

# -- Hugging Face config.json ----------------------------------------------------------


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face config.json of a type in `ARCHITECTURES`.

    Keys of transformers 5 (`rope_parameters`, `dtype`) win over those of 4.
    Missing keys take transformers' own defaults for that model type.

    Raises:
        InputError: another model type, an unknown key, or a value this model lacks.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(f"config.json has model_type {shortened(model_type)}; jaxgpt reads {', '.join(ARCHITECTURES)}")
    for key, allowed in REQUIRED_VALUES.items():
        if key in hf and hf[key] not in allowed:
            raise InputError(f"config.json has {key}={shortened(hf[key])}; jaxgpt supports {allowed[0]!r} only")
    values, understood = (_from_gpt2 if model_type == "gpt2" else _from_llama)(hf)
    unknown = sorted(map(str, hf.keys() - understood - HARMLESS.keys() - REQUIRED_VALUES.keys()))
    if unknown:
        raise InputError(
            f"config.json has keys jaxgpt does not know: {first(unknown)}; remove them if they change nothing"
        )
    config = ModelConfig(**values)
    # Its name table is chosen by the config's fields: they must allow this type.
    if model_type not in hf_model_types(config):
        raise InputError(f"config.json says {model_type}, but its values are those of a {hf_model_type(config)}")
    return config


def _required(hf: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in hf]
    if missing:
        raise InputError(f"config.json lacks {first(missing)}")


def _given(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, or the default where the key is missing or null; 0 and false are values."""
    value = hf.get(key)
    return default if value is None else value


def _heads(hf: Mapping[str, Any], width: str, heads: str) -> tuple[int, int]:
    """(D, N) of a config: the only values computed with before ModelConfig checks them."""
    for key in (width, heads):
        field_checks.size(f"config.json: {key}", hf[key])
    if hf[width] % hf[heads]:
        raise InputError(f"config.json has {width}={hf[width]}, which is not a multiple of {heads}={hf[heads]}")
    return hf[width], hf[heads]


def _switch(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    field_checks.switch(f"config.json: {key}", hf.get(key, default))
    return hf.get(key, default)


def _activation(name: Any) -> Any:
    return ACTIVATION_NAMES.get(name, name) if isinstance(name, str) else name


_SAME_NAMES = ("vocab_size", "tie_word_embeddings", "initializer_range")
_LLAMA_NAMES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"),
    *("attention_dropout", "layer_types", "rope_theta", "rope_scaling", "rope_parameters"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
)


def _from_gpt2(hf: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    _required(hf, ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"))
    renamed = {ours: hf[theirs] for theirs, ours in GPT2_NAMES.items() if theirs in hf}
    hidden, heads = _heads(hf, "n_embd", "n_head")
    values = {
        **renamed,
        "vocab_size": hf["vocab_size"],
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": _given(hf, "n_inner", 4 * hidden),
        "hidden_act": _activation(hf.get("activation_function", "gelu_new")),
        "tie_word_embeddings": _switch(hf, "tie_word_embeddings", True),
        **{name: hf.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
        "initializer_range": hf.get("initializer_range", 0.02),
    }
    return values, {*GPT2_NAMES, *_SAME_NAMES, "embd_pdrop", "attn_pdrop", "resid_pdrop"}


@dataclass(frozen=True)
class _Type:
    """In what one Hugging Face type of the Llama class differs from the others."""

    context: int
    """Its max_position_embeddings where config.json does not say it; likewise the next two."""
    kv_heads: int | None = None
    """None for as many as query heads."""
    head_dim: int | None = None
    """None for the share of each head in the width."""
    biases: tuple[str, ...] = ()
    """Keys of biases that it reads."""
    any_width: bool = False
    """The heads need not divide the width."""


_TYPES = {
    "llama": _Type(2048, biases=("attention_bias", "mlp_bias")),
    "mistral": _Type(131072, kv_heads=8, any_width=True),
    "qwen2": _Type(32768, kv_heads=32),
    "qwen3": _Type(32768, kv_heads=32, head_dim=128, biases=("attention_bias",), any_width=True),
}
"""Defaults are those of transformers 5.23, which are those of 4."""


def _from_llama(hf: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    _required(hf, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    model_type: str = hf["model_type"]
    of_type = _TYPES[model_type]
    biases = {key: _switch(hf, key, False) for key in ("attention_bias", "mlp_bias")}
    unread = [key for key, has in biases.items() if has and key not in of_type.biases]
    if unread:
        raise InputError(f"config.json of a {model_type} model has {first(unread)}, which {model_type} does not read")
    context = hf.get("max_position_embeddings", of_type.context)
    theta, scaling = rope_scaling.read(hf, context)
    hidden, heads, head_dim = _llama_heads(hf, of_type)
    kv_heads = heads if "num_key_value_heads" in hf or of_type.kv_heads is None else of_type.kv_heads
    values = {
        **LLAMA_STYLE,
        **{key: hf[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        "hidden_size": hidden,
        "num_attention_heads": heads,
        # null means as many as query heads; a missing key means transformers' default of the type.
        "num_key_value_heads": _given(hf, "num_key_value_heads", kv_heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "hidden_act": _activation(hf.get("hidden_act", "silu")),
        "qkv_bias": model_type == "qwen2" or biases["attention_bias"],
        "attention_output_bias": biases["attention_bias"],
        "mlp_bias": biases["mlp_bias"],
        "qk_norm": model_type == "qwen3",
        "sliding_window": _window(hf, model_type),
        "tie_word_embeddings": _switch(hf, "tie_word_embeddings", False),
        "attn_pdrop": hf.get("attention_dropout", 0.0),
        "initializer_range": hf.get("initializer_range", 0.02),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    return values, {*_SAME_NAMES, *_LLAMA_NAMES}


def _llama_heads(hf: Mapping[str, Any], of_type: _Type) -> tuple[int, int, Any]:
    """(D, N, H); where H is not said and the type has none of its own, it is the share of a head in the width."""
    head_dim = hf.get("head_dim", of_type.head_dim)
    if of_type.head_dim is None and (head_dim is None or not of_type.any_width):
        hidden, heads = _heads(hf, "hidden_size", "num_attention_heads")
        return hidden, heads, _given(hf, "head_dim", hidden // heads)
    return hf["hidden_size"], hf["num_attention_heads"], head_dim


def _window(hf: Mapping[str, Any], model_type: str) -> Any:
    """The sliding window that every layer has; None for none.

    Raises:
        InputError: layers differ, or the type does not read a window that is switched on.
    """
    layers = hf["num_hidden_layers"]
    field_checks.size("config.json: num_hidden_layers", layers)
    switched_on = _switch(hf, "use_sliding_window", False)
    if switched_on and model_type not in ("qwen2", "qwen3"):
        raise InputError(f"config.json has use_sliding_window=True, which {model_type} does not read; remove it")
    window = hf.get("sliding_window", 4096) if switched_on or model_type == "mistral" else None
    sliding = 0 if window is None else layers
    if switched_on and window is not None:
        begins = hf.get("max_window_layers", 28)
        field_checks.count("config.json: max_window_layers", begins)
        sliding = max(0, layers - begins)
    kinds: Any = _given(hf, "layer_types", [])
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise InputError("config.json has layer_types other than full_attention and sliding_attention")
    if kinds:
        sliding = layers * kinds.count("sliding_attention") / len(kinds)
    if sliding == 0 and (model_type != "mistral" or window is None):
        return None
    if sliding != layers or window is None:
        raise InputError(
            "config.json has a sliding window in some layers only; jaxgpt has it in all layers or in none: "
            "check layer_types, max_window_layers and sliding_window"
        )
    return window


def hf_model_type(config: ModelConfig) -> str:
    """The first Hugging Face model type that this config is.

    Raises:
        InputError: no such type exists, naming the fields that fit none.
    """
    types = hf_model_types(config)
    if types:
        return types[0]
    c = config
    raise InputError(
        f"this architecture has no Hugging Face model type ({', '.join(ARCHITECTURES)}): "
        f"position_embedding={c.position_embedding}, norm={c.norm}, gated_mlp={c.gated_mlp}, "
        f"qkv_bias={c.qkv_bias}, attention_output_bias={c.attention_output_bias}, mlp_bias={c.mlp_bias}, "
        f"qk_norm={c.qk_norm}, sliding_window={c.sliding_window}, "
        f"heads={c.num_attention_heads}x{c.head_dim}, hidden_size={c.hidden_size}"
    )


def hf_model_types(config: ModelConfig) -> tuple[str, ...]:
    """Every Hugging Face model type that this config is, decided by its fields; empty for none.

    More than one where types differ in their defaults alone: a Mistral without a window is a Llama.
    """
    c = config
    if (c.position_embedding, c.norm, c.gated_mlp) == ("learned", "layernorm", False):
        biased = c.qkv_bias and c.attention_output_bias and c.mlp_bias
        square = c.num_key_value_heads == c.num_attention_heads and c.head_dim * c.num_attention_heads == c.hidden_size
        plain = not c.qk_norm and c.sliding_window is None
        return ("gpt2",) if biased and square and plain else ()
    if (c.position_embedding, c.norm, c.gated_mlp) != ("rope", "rmsnorm", True):
        return ()
    same = c.qkv_bias == c.attention_output_bias
    fits = {
        "llama": same and not c.qk_norm and c.sliding_window is None,
        "mistral": same and not (c.qk_norm or c.qkv_bias or c.mlp_bias),
        "qwen2": c.qkv_bias and not (c.attention_output_bias or c.qk_norm or c.mlp_bias),
        "qwen3": same and c.qk_norm and not c.mlp_bias,
    }
    # transformers refuses a Llama whose width the heads do not divide, whatever head_dim is.
    divisible = c.hidden_size % c.num_attention_heads == 0
    return tuple(name for name, fit in fits.items() if fit and (divisible or _TYPES[name].any_width))


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def to_hf(config: ModelConfig, dtype: str, model_type: str | None = None) -> dict[str, Any]:
    """config.json for stock transformers, keys of both 4 and 5; inverse of `from_hf`.

    Args:
        config: the model.
        dtype: the weights' dtype name, e.g. "float32".
        model_type: one of `hf_model_types`, by default the first.

    Raises:
        InputError: the config has no Hugging Face type, or not this one.
    """
    model_type = model_type or hf_model_type(config)
    if model_type not in hf_model_types(config):
        raise InputError(f"this model is no {model_type}: its values are those of a {hf_model_type(config)}")
    shared = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": True,
    }
    if model_type == "gpt2":
        values = config.to_dict()
        renamed = {theirs: values[ours] for theirs, ours in GPT2_NAMES.items()}
        drops = {name: values[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        return {**shared, **renamed, **drops}
    return {**shared, **_to_llama(config, model_type)}


def _to_llama(config: ModelConfig, model_type: str) -> dict[str, Any]:
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_theta")  # fmt: skip
    scaling = rope_scaling.keys(config.rope_scaling)
    values: dict[str, Any] = {name: getattr(config, name) for name in same}
    values["attention_dropout"] = config.attn_pdrop
    values["rope_scaling"] = scaling or None
    values["rope_parameters"] = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    if model_type != "qwen2" or config.head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    values |= {key: biases[key] for key in _TYPES[model_type].biases}
    if model_type == "mistral":
        values["sliding_window"] = config.sliding_window
    if model_type in ("qwen2", "qwen3"):
        values |= _window_keys(config)
    return values


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    """Of Qwen's types, which may have a window in the layers from one on."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    window = {"sliding_window": config.sliding_window, "max_window_layers": 0}
    return {"use_sliding_window": True, **window, "layer_types": ["sliding_attention"] * config.num_hidden_layers}
