"""The candidate's config against what the reference's config.json says, field by field.

Most fields are seen in what they compute, and the context of learned positions in the
rows of their table; what no op reads, such as the context of a model with RoPE, and what
rounding hides, is seen here only. The reference's side is
torchref's own reading, not the product's translation, which is under test. Dropout and
the spread of fresh weights are left out: they change nothing of a model that is there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from oracle import text_reference
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import CONFIG_FIELD, Finding
from oracle.site import Site
from torchref.config import GPT2Config, LlamaConfig, Rope

STOPS = "eos_token_ids"
CONTEXT = "max_position_embeddings"
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
"""Of transformers' config classes, where config.json does not say it."""
_ACTIVATIONS = {"gelu_tanh": "gelu_new"}
"""torchref's names where ours are others."""


def findings(comparison: Comparison) -> list[Finding]:
    """One broken finding for each field in which candidate and reference differ."""
    ours = _comparable(comparison.candidate.config.to_dict()) | {STOPS: sorted(comparison.stop_ids or ())}
    file = "the reference's config.json" if comparison.source else "the export's config.json"
    expected = _expected(comparison) | _stops(comparison)
    unlike = {name: value for name, value in expected.items() if ours[name] != value}
    said = {
        name: f"the checkpoint has {_shown(name, ours[name])}, {file} says {_shown(name, theirs)}"
        for name, theirs in unlike.items()
    }
    return [Finding(CONFIG_FIELD + name, "", ok=False, problem=problem) for name, problem in said.items()]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        kind, *numbers = value
        return f"{kind} ({', '.join(f'{name} {number}' for name, number in zip(_READ[kind], numbers, strict=True))})"
    if value == []:
        return "none"
    return f"{value:,}" if type(value) is int else _ABSENT[name] if value is None else str(value)


_ABSENT = {"rope_scaling": "no scaling", "sliding_window": "no window"}


_READ: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""What each kind of scaling reads."""


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling as what its kind reads; one by 1 is none."""
    scaling = config["rope_scaling"]
    return {**config, "rope_scaling": _scaling(scaling["rope_type"], scaling) if scaling else None}


def _scaling(kind: str, values: Mapping[str, Any]) -> Any:
    if values["factor"] == 1 and (kind != "yarn" or values["attention_factor"] in (None, 1)):
        return None
    return (kind, *(values[name] for name in _READ[kind]))


# -- The reference's side --------------------------------------------------------------


def _expected(comparison: Comparison) -> dict[str, Any]:
    """What the reference says, under the candidate's names."""
    config = comparison.reference.truth.decoder.config
    if isinstance(config, GPT2Config):
        return _of_gpt2(config)
    place = comparison.source or comparison.export
    raw: dict[str, Any] = json.loads((place / "config.json").read_text("utf-8")) if place else {}
    context = raw.get(CONTEXT) or _DEFAULT_CONTEXT.get(raw.get("model_type", ""))
    return _of_llama(config) | ({CONTEXT: context} if context else {})


def _stops(comparison: Comparison) -> dict[str, Any]:
    """Ids that end a text, unless the rung ids has compared them with the tokenizer's."""
    place = comparison.source or comparison.export
    if comparison.stop_ids is None or place is None:
        return {}
    rows = comparison.candidate.config.vocab_size
    return {STOPS: sorted(id for id in text_reference.stop_ids(place) if id < rows)}


def _of_gpt2(config: GPT2Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "position_embedding": "learned",
        "norm": "layernorm",
        "rms_norm_eps": config.layer_norm_epsilon,
        "hidden_act": _ACTIVATIONS.get(config.activation, config.activation),
        "gated_mlp": False,
        **dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias"), True),
        "qk_norm": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


_SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "qkv_bias", "mlp_bias", "tie_word_embeddings"),
    *("qk_norm", "sliding_window"),
)


def _of_llama(config: LlamaConfig) -> dict[str, Any]:
    return {
        **{name: getattr(config, name) for name in _SAME_NAMES},
        "position_embedding": "rope",
        "norm": "rmsnorm",
        "hidden_act": _ACTIVATIONS.get(config.activation, config.activation),
        "gated_mlp": True,
        "attention_output_bias": config.output_bias,
        "rope_theta": config.rope.theta,
        "rope_scaling": _scaling_of(config.rope),
    }


def _scaling_of(rope: Rope) -> Any:
    return None if rope.kind == "default" else _scaling(rope.kind, vars(rope))


# -- One field -------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigSite(Site):
    """A field that differs."""

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`."""
        found = findings(replace(self.comparison, candidate=candidate))
        same = (finding for finding in found if finding.tap == self.finding.tap)
        return next(same, replace(self.finding, ok=True, problem=""))
