"""Which classes of fault a run could have shown, and which not, with the reason.

A pass says nothing about a fault that the weights, the inputs or the rungs could
not have exposed; the report says which those are.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxgpt.config import ModelConfig
from oracle import probe, text_reference

if TYPE_CHECKING:
    from oracle.comparison import Comparison

WEIGHTS = (
    "kernel transposed",
    "qkv packing order",
    "query, key and value swapped",
    "layers in lexicographic order",
    "bf16 bits read as fp16",
    "tensor left at its random init",
    "bias dropped",
    "weights of another revision",
)
"""Wrong parameters: without their source there is nothing to compare them with."""
EXPORT = ("exporter layout or names",)
OPERATORS = ("norm epsilon", "attention scale missing", "causal mask off by one", "activation variant")
DECODE = (
    "cache offset",
    "cache position not advanced",
    "stale cache slot",
    "left-pad positions",
    "batch pad mask ignored",
)
TRAINING = {
    "loss": ("label shift", "loss mask", "padding trained", "dropout in training", "loss normalisation"),
    "gradients": ("gradients",),
    "optimizer": ("gradient accumulation", "clipping", "learning-rate schedule", "weight decay", "optimizer"),
}
"""By the rung that shows them."""
TEXT = (
    "special ids",
    "special ids saved wrong",
    "prefix-matching special",
    "user text read as special tokens",
    "BOS doubled",
    "pre-tokenizer",
    "chat template",
    "mask of a conversation",
    "template of the reference folder",
)


def classes(comparison: "Comparison", rungs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the exposed classes, and the reason for each hidden one."""
    config = comparison.candidate.config
    hidden = _without_rungs(rungs) | _without_weights(comparison, rungs) | _by_config(config)
    hidden |= _by_text(comparison, rungs)
    training = [name for names in TRAINING.values() for name in names]
    known = [*WEIGHTS, *EXPORT, *OPERATORS, *training, *DECODE, *TEXT, *_CONFIG_CLASSES]
    return [name for name in known if name not in hidden], hidden


def _without_rungs(rungs: Sequence[str]) -> dict[str, str]:
    needs = {"bits": [*WEIGHTS, *EXPORT], "operators": [*OPERATORS, *_CONFIG_CLASSES], "decode": DECODE, **TRAINING}
    missing = {rung: names for rung, names in needs.items() if rung not in rungs}
    return {name: f"the rung {rung} was not reached" for rung, names in missing.items() for name in names}


def _without_weights(comparison: "Comparison", rungs: Sequence[str]) -> dict[str, str]:
    if comparison.source is not None:
        return {}
    # These look like no weights at all, whatever they are compared with.
    seen = {"bf16 bits read as fp16"} if "statistics" in rungs else set[str]()
    lost = [name for name in WEIGHTS if name not in seen]
    return dict.fromkeys(lost, "no --reference folder to compare the weights with")


_CONFIG_CLASSES: Mapping[str, str] = {
    "RoPE interleaved": "the model has no RoPE",
    "RoPE theta": "the model has no RoPE",
    "RoPE scaling ignored": "the model has no RoPE scaling",
    "GQA repeat against tile": "the model has one query head per key head, or one key head",
    "gate and up swapped": "the MLP is not gated",
    "positions beyond 512": "the context is shorter",
    "end of the context": "decoding to it is left out for large models",
}
"""Classes that need something of the model, with what it lacks if they are hidden."""


def _by_config(config: ModelConfig) -> dict[str, str]:
    has_rope = config.position_embedding == "rope"
    shown = {
        "RoPE interleaved": has_rope,
        "RoPE theta": has_rope,
        "RoPE scaling ignored": config.rope_scaling is not None,
        "GQA repeat against tile": 1 < config.num_key_value_heads < config.num_attention_heads,
        "gate and up swapped": config.gated_mlp,
        "positions beyond 512": config.max_position_embeddings > 512,
        "end of the context": probe.is_cheap(config),
    }
    return {name: reason for name, reason in _CONFIG_CLASSES.items() if not shown[name]}


def _by_text(comparison: "Comparison", rungs: Sequence[str]) -> dict[str, str]:
    text = comparison.candidate.text
    if "ids" not in rungs:
        return dict.fromkeys(TEXT, "the rung ids was not reached")
    if text is None:
        return dict.fromkeys(TEXT, "the checkpoint has no tokenizer")
    if not text_reference.references(comparison):
        return dict.fromkeys(TEXT, text_reference.MISSING)
    strings = text.saved["special_token_ids"]
    begins = any(a != b and a.startswith(b) for a in strings for b in strings)
    known = comparison.source is not None and text_reference.has_tokenizer(comparison.source)
    no_template = "" if text.saved_template else "the checkpoint has no template"
    reasons = {
        "special ids saved wrong": "" if known else "no --reference folder with a tokenizer",
        "prefix-matching special": "" if begins else "no special token begins another",
        "pre-tokenizer": "the tokenizer has none" if text.saved["kind"] == "char" else "",
        "chat template": no_template,
        "mask of a conversation": no_template,
        "template of the reference folder": "chat templates in Jinja are programs, which the oracle does not run",
    }
    return {name: reason for name, reason in reasons.items() if reason}
