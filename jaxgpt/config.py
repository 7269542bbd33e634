"""One model config: Llama-style Hugging Face names, framework-free.

Architectures differ in fields, never in a name: GPT-2 and Llama/Qwen2 are two
points of the same space. `from_hf` and `to_hf` translate Hugging Face's
config.json (transformers 4 and 5) strictly: a key that is neither understood nor
known to be harmless is refused, because a key that is ignored is a model that is
wrong without saying so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt import field_checks
from jaxgpt.errors import InputError, first
from jaxgpt.field_checks import shortened
from jaxgpt.hf_keys import ACTIVATION_NAMES, GPT2_NAMES, HARMLESS, REQUIRED_VALUES


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`; `llama3` divides only the slow
    ones and blends in between (Llama 3.1; transformers `modeling_rope_utils.py`).
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        field_checks.one_of("rope_scaling.rope_type", self.rope_type, ("linear", "llama3"))
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            field_checks.positive(f"rope_scaling.{name}", getattr(self, name))
        field_checks.size("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings)
        if self.factor < 1.0:
            raise InputError(f"rope_scaling.factor must be >= 1, got {self.factor}")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                "rope_scaling.high_freq_factor must exceed low_freq_factor, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )


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
            plain["rope_scaling"] = _scaling(plain["rope_scaling"])
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
    "tie_word_embeddings",
)
_CHOICES = {
    "position_embedding": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "hidden_act": ("gelu_new", "gelu", "silu"),
}


def _scaling(values: Mapping[str, Any]) -> RopeScaling:
    known = {f.name: f for f in dataclasses.fields(RopeScaling)}
    unknown = sorted(map(str, values.keys() - known.keys()))
    if unknown:
        raise InputError(f"rope_scaling has unknown keys {first(unknown)}; this version knows {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise InputError(f"rope_scaling lacks {first(missing)}")
    return RopeScaling(**values)


# -- Presets ---------------------------------------------------------------------------

GPT2 = ModelConfig(
    vocab_size=50304,  # 50,257 rounded up to a multiple of 64
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    max_position_embeddings=1024,
)
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

PRESETS: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "tiny": dataclasses.replace(
        GPT2,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
    ),
    "llama-tiny": dataclasses.replace(
        GPT2,
        **LLAMA_STYLE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    ),
    "qwen2-0.5b": ModelConfig(
        **QWEN2_STYLE,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "llama3-8b": ModelConfig(
        **LLAMA_STYLE,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    ),
}


# -- Hugging Face config.json ----------------------------------------------------------


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face config.json of `gpt2`, `llama` or `qwen2`.

    Keys of transformers 5 (`rope_parameters`, `dtype`) win over those of 4.
    Missing keys take transformers' own defaults for that model type.

    Raises:
        InputError: another model type, an unknown key, or a value this model lacks.
    """
    model_type = hf.get("model_type")
    readers = {"gpt2": _from_gpt2, "llama": _from_llama, "qwen2": _from_llama}
    if not isinstance(model_type, str) or model_type not in readers:
        raise InputError(f"config.json has model_type {shortened(model_type)}; jaxgpt reads {', '.join(readers)}")
    for key, allowed in REQUIRED_VALUES.items():
        if key in hf and hf[key] not in allowed:
            raise InputError(f"config.json has {key}={shortened(hf[key])}; jaxgpt supports {allowed[0]!r} only")
    values, understood = readers[model_type](hf)
    unknown = sorted(map(str, hf.keys() - understood - HARMLESS.keys() - REQUIRED_VALUES.keys()))
    if unknown:
        raise InputError(
            f"config.json has keys jaxgpt does not know: {first(unknown)}; remove them if they change nothing"
        )
    config = ModelConfig(**values)
    # Its name table is chosen by the config's fields: they must say the same type.
    if hf_model_type(config) != model_type:
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


def _from_llama(hf: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    _required(hf, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    is_qwen2 = hf["model_type"] == "qwen2"
    layer_types = _given(hf, "layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise InputError("config.json has layer_types other than full_attention; jaxgpt supports full_attention only")
    attention_bias, mlp_bias = _switch(hf, "attention_bias", False), _switch(hf, "mlp_bias", False)
    if is_qwen2 and (attention_bias or mlp_bias):
        raise InputError("config.json of a qwen2 model has attention_bias or mlp_bias, which qwen2 does not read")
    theta, scaling = _rope(hf)
    hidden, heads = _heads(hf, "hidden_size", "num_attention_heads")
    kv_heads = heads if "num_key_value_heads" in hf or not is_qwen2 else 32
    values = {
        **LLAMA_STYLE,
        **{key: hf[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        "hidden_size": hidden,
        "num_attention_heads": heads,
        # null means as many as query heads; a missing key means transformers' default of the type.
        "num_key_value_heads": _given(hf, "num_key_value_heads", kv_heads),
        "head_dim": _given(hf, "head_dim", hidden // heads),
        "max_position_embeddings": hf.get("max_position_embeddings", 32768 if is_qwen2 else 2048),
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "hidden_act": _activation(hf.get("hidden_act", "silu")),
        "qkv_bias": True if is_qwen2 else attention_bias,
        "attention_output_bias": False if is_qwen2 else attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": _switch(hf, "tie_word_embeddings", False),
        "attn_pdrop": hf.get("attention_dropout", 0.0),
        "initializer_range": hf.get("initializer_range", 0.02),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    return values, {*_SAME_NAMES, *_LLAMA_NAMES}


_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_SCALING_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""Keys of each rope type; all are needed."""


def _rope(hf: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    key, parameters = _rope_parameters(hf)
    theta = _given(parameters, "rope_theta", _given(hf, "rope_theta", 10000.0))
    rope_type: Any = parameters.get("rope_type", parameters.get("type", "default"))
    field_checks.one_of(f"config.json: rope_type of {key}", rope_type, tuple(_SCALING_KEYS))
    needed = _SCALING_KEYS[rope_type]
    missing, unknown = sorted(needed - parameters.keys()), sorted(map(str, parameters.keys() - needed - _ROPE_KEYS))
    if missing:
        raise InputError(f"config.json has rope type {rope_type!r} without {first(missing)}")
    if unknown:
        raise InputError(
            f"config.json has rope type {rope_type!r} with {first(unknown)}, which it does not read; "
            "check rope_type, or remove them"
        )
    return theta, RopeScaling(rope_type, **{name: parameters[name] for name in needed}) if needed else None


def _rope_parameters(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key that is read, and its object."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    parameters = _given(hf, key, {})
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.json has {key}={shortened(parameters)}; expected an object with rope_type")
    if parameters.get("partial_rotary_factor") not in REQUIRED_VALUES["partial_rotary_factor"]:
        raise InputError(f"config.json has partial_rotary_factor in {key}; jaxgpt rotates whole heads only")
    return key, parameters


def hf_model_type(config: ModelConfig) -> str:
    """The Hugging Face model type that this config is, decided by its fields.

    Raises:
        InputError: no such type exists, naming the fields that fit none.
    """
    c = config
    if c.position_embedding == "learned" and c.norm == "layernorm" and not c.gated_mlp:
        biased = c.qkv_bias and c.attention_output_bias and c.mlp_bias
        square = c.num_key_value_heads == c.num_attention_heads and c.head_dim * c.num_attention_heads == c.hidden_size
        if biased and square:
            return "gpt2"
    # transformers refuses a width that the heads do not divide, whatever head_dim is.
    divisible = c.hidden_size % c.num_attention_heads == 0
    if c.position_embedding == "rope" and c.norm == "rmsnorm" and c.gated_mlp and divisible:
        if c.qkv_bias == c.attention_output_bias:
            return "llama"
        if c.qkv_bias and not c.mlp_bias:
            return "qwen2"
    raise InputError(
        "this architecture has no Hugging Face model type (gpt2, llama, qwen2): "
        f"position_embedding={c.position_embedding}, norm={c.norm}, gated_mlp={c.gated_mlp}, "
        f"qkv_bias={c.qkv_bias}, attention_output_bias={c.attention_output_bias}, mlp_bias={c.mlp_bias}, "
        f"heads={c.num_attention_heads}x{c.head_dim}, hidden_size={c.hidden_size}"
    )


ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for stock transformers, keys of both 4 and 5; inverse of `from_hf`.

    `dtype` is the weights' dtype name, e.g. "float32".
    """
    model_type = hf_model_type(config)
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
    scaling = _scaling_keys(config.rope_scaling)
    values: dict[str, Any] = {name: getattr(config, name) for name in same}
    values["attention_dropout"] = config.attn_pdrop
    values["rope_scaling"] = scaling or None
    values["rope_parameters"] = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    if model_type == "llama":
        values |= {"head_dim": config.head_dim, "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    else:
        values["use_sliding_window"] = False
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            values["head_dim"] = config.head_dim
    return values


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return dataclasses.asdict(scaling)
