"""Which classes of fault a run could have shown, and which not, with the reason.

A pass says nothing about a fault that the weights, the inputs or the rungs could
not have exposed; the report says which those are.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxgpt.config import ModelConfig
from oracle import probe

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
TRAINING = ("label shift", "loss mask", "gradients", "optimizer", "dropout in training")
TEXT = ("special ids", "BOS doubled", "pre-tokenizer", "chat template")


def classes(comparison: "Comparison", rungs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the exposed classes, and the reason for each hidden one."""
    config = comparison.candidate.config
    hidden = _without_rungs(rungs) | _without_weights(comparison) | _by_config(config)
    hidden |= dict.fromkeys(TRAINING, "no rung compares training yet")
    hidden |= dict.fromkeys(TEXT, "no rung compares text yet")
    known = [*WEIGHTS, *EXPORT, *OPERATORS, *DECODE, *_CONFIG_CLASSES]
    return [name for name in known if name not in hidden], hidden


def _without_rungs(rungs: Sequence[str]) -> dict[str, str]:
    needs = {"bits": [*WEIGHTS, *EXPORT], "operators": [*OPERATORS, *_CONFIG_CLASSES], "decode": DECODE}
    missing = {rung: names for rung, names in needs.items() if rung not in rungs}
    return {name: f"the rung {rung} was not reached" for rung, names in missing.items() for name in names}


def _without_weights(comparison: "Comparison") -> dict[str, str]:
    if comparison.source is not None:
        return {}
    return dict.fromkeys(WEIGHTS, "no --reference folder to compare the weights with")


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
