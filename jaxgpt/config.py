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

from jaxgpt.errors import InputError, first


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
        _one_of("rope_scaling.rope_type", self.rope_type, ("linear", "llama3"))
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
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        for name, choices in _CHOICES.items():
            _one_of(name, getattr(self, name), choices)
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
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
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise InputError(f"model config has unknown keys {first(unknown)}; this version knows {len(fields)} fields")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise InputError(f"model config lacks {first(missing)}")
        plain = dict(values)
        if isinstance(plain.get("rope_scaling"), Mapping):
            plain["rope_scaling"] = RopeScaling(**plain["rope_scaling"])
        return cls(**plain)


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_CHOICES = {
    "position_embedding": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "hidden_act": ("gelu_new", "gelu", "silu"),
}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


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

GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
"""GPT-2's names for fields of ModelConfig."""

ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
"""Other spellings transformers uses for the same function."""

HARMLESS = {
    "architectures": "names the class of another program",
    "model_type": "read first, to choose the translation",
    "transformers_version": "provenance",
    "dtype": "the weights' dtype is read from their file",
    "torch_dtype": "the weights' dtype is read from their file",
    "use_cache": "every model here has a cache",
    "bos_token_id": "belongs to the tokenizer",
    "eos_token_id": "read by the importer as stop ids",
    "pad_token_id": "belongs to the tokenizer",
    "task_specific_params": "generation defaults of another program",
    "_name_or_path": "provenance",
    "name_or_path": "provenance",
    "pretraining_tp": "splits a matrix product without changing it",
    "n_ctx": "GPT-2's old name for n_positions",
    "summary_type": "sequence classification head",
    "summary_use_proj": "sequence classification head",
    "summary_activation": "sequence classification head",
    "summary_first_dropout": "sequence classification head",
    "summary_proj_to_labels": "sequence classification head",
    "return_dict": "output format of another program",
    "output_attentions": "output format of another program",
    "output_hidden_states": "output format of another program",
    "return_dict_in_generate": "output format of another program",
    "chunk_size_feed_forward": "splits a matrix product without changing it",
    "is_encoder_decoder": "checked below",
    "id2label": "classification head",
    "label2id": "classification head",
    "problem_type": "classification head",
    "max_window_layers": "read only with use_sliding_window",
    "sliding_window": "read only with use_sliding_window",
    "partial_rotary_factor": "checked below",
}
"""config.json keys that change nothing here, each with the reason."""

REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # a precision choice; scores are fp32 here anyway
    "add_cross_attention": (False,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "tie_encoder_decoder": (False,),
}
"""config.json keys of which only some values mean the model that is built here."""


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face config.json of `gpt2`, `llama` or `qwen2`.

    Keys of transformers 5 (`rope_parameters`, `dtype`) win over those of 4.
    Missing keys take transformers' own defaults for that model type.

    Raises:
        InputError: another model type, an unknown key, or a value this model lacks.
    """
    model_type = hf.get("model_type")
    readers = {"gpt2": _from_gpt2, "llama": _from_llama, "qwen2": _from_llama}
    if model_type not in readers:
        raise InputError(f"config.json has model_type {model_type!r}; jaxgpt reads {', '.join(readers)}")
    for key, allowed in REQUIRED_VALUES.items():
        if key in hf and hf[key] not in allowed:
            raise InputError(f"config.json has {key}={hf[key]!r}; jaxgpt supports {allowed[0]!r} only")
    values, understood = readers[model_type](hf)
    unknown = sorted(hf.keys() - understood - HARMLESS.keys() - REQUIRED_VALUES.keys())
    if unknown:
        raise InputError(
            f"config.json has keys jaxgpt does not know: {first(unknown)}; remove them if they change nothing"
        )
    return ModelConfig(**values)


def _required(hf: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in hf]
    if missing:
        raise InputError(f"config.json lacks {first(missing)}")


def _activation(name: Any) -> Any:
    return ACTIVATION_NAMES.get(name, name)


def _from_gpt2(hf: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    _required(hf, ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"))
    renamed = {ours: hf[theirs] for theirs, ours in GPT2_NAMES.items() if theirs in hf}
    hidden, heads = hf["n_embd"], hf["n_head"]
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise InputError(f"config.json has n_embd={hidden!r}, which is not a multiple of n_head={heads!r}")
    values = {
        **renamed,
        "vocab_size": hf["vocab_size"],
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": hf.get("n_inner") or 4 * hidden,
        "hidden_act": _activation(hf.get("activation_function", "gelu_new")),
        "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        **{name: hf.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
        "initializer_range": hf.get("initializer_range", 0.02),
    }
    return values, {*GPT2_NAMES, *values}


def _from_llama(hf: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    _required(hf, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    is_qwen2 = hf["model_type"] == "qwen2"
    layer_types = hf.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise InputError("config.json has layer_types other than full_attention; jaxgpt supports full_attention only")
    if is_qwen2 and (hf.get("attention_bias") or hf.get("mlp_bias")):
        raise InputError("config.json of a qwen2 model has attention_bias or mlp_bias, which qwen2 does not read")
    theta, scaling = _rope(hf)
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"config.json has num_attention_heads={heads!r}; expected a positive integer")
    attention_bias = bool(hf.get("attention_bias", False))
    values = {
        **LLAMA_STYLE,
        **{key: hf[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        "num_attention_heads": heads,
        # null means as many as query heads; a missing key means transformers' default of the type.
        "num_key_value_heads": hf.get("num_key_value_heads", 32 if is_qwen2 else heads) or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "max_position_embeddings": hf.get("max_position_embeddings", 32768 if is_qwen2 else 2048),
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "hidden_act": _activation(hf.get("hidden_act", "silu")),
        "qkv_bias": True if is_qwen2 else attention_bias,
        "attention_output_bias": False if is_qwen2 else attention_bias,
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "attn_pdrop": hf.get("attention_dropout", 0.0),
        "initializer_range": hf.get("initializer_range", 0.02),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    read_elsewhere = {"attention_bias", "attention_dropout", "layer_types", "rope_parameters"}
    return values, {*values, *read_elsewhere}


_ROPE_KEYS = {"rope_theta", "rope_type", "type"}


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    parameters: Mapping[str, Any] = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", hf.get("rope_theta", 10000.0))
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return float(theta), None
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    unknown = sorted(parameters.keys() - known - _ROPE_KEYS - {"partial_rotary_factor"})
    if rope_type not in ("linear", "llama3") or unknown:
        raise InputError(
            f"config.json has rope type {rope_type!r} with keys {first(sorted(parameters))}; "
            "jaxgpt supports default, linear and llama3"
        )
    values = {key: parameters[key] for key in known - {"rope_type"} if key in parameters}
    needed = known - {"rope_type"} if rope_type == "llama3" else {"factor"}
    if not needed <= values.keys():
        raise InputError(f"config.json has rope type {rope_type!r} without {first(sorted(needed - values.keys()))}")
    return float(theta), RopeScaling(rope_type=rope_type, **values)


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
    if c.position_embedding == "rope" and c.norm == "rmsnorm" and c.gated_mlp:
        if c.qkv_bias == c.attention_output_bias:
            return "llama"
        if c.qkv_bias and not c.mlp_bias and c.head_dim * c.num_attention_heads == c.hidden_size:
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
    return values


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return dataclasses.asdict(scaling)
