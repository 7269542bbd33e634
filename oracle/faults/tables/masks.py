"""Rows: wrong masks and a wrong softmax. They must show in the rung operators, at the first op of their kind."""

from jaxgpt.config import ModelConfig
from jaxgpt.ops import OpFunction
from oracle.faults import attention as a
from oracle.faults.fault import Fault, Plant, at, instead, misread

OPS = "operators"
MASK, MASKED, WEIGHTS = "mask", "layers.0.attn.masked", "layers.0.attn.weights"


def _masked_by(wrong: OpFunction) -> Plant:
    """In every layer, by tap: `mask` is also the name of the tap that all layers share."""
    return lambda candidate: instead(
        {f"layers.{layer}.attn.masked": wrong for layer in range(candidate.config.num_hidden_layers)}
    )(candidate)


def _has_window(config: ModelConfig) -> bool:
    """Attention has a sliding window."""
    return config.sliding_window is not None


MASKS = (
    Fault(
        "causal mask off by one",
        "the mask shows the next token",
        instead({"attention_mask": a.sees_next}),
        OPS,
        at(MASK),
    ),
    Fault(
        "causal mask off by one",
        "the mask hides a token from itself",
        instead({"attention_mask": a.blind_to_itself}),
        OPS,
        at(MASK),
        place="strict",
    ),
    Fault("mask not causal", "the mask is not causal", instead({"attention_mask": a.not_causal}), OPS, at(MASK)),
    Fault(
        "mask not causal",
        "the scores are not masked",
        instead({"layers.1.attn.masked": a.not_masked}),
        OPS,
        at("layers.1.attn.masked"),
        place="one layer",
    ),
    Fault(
        "sliding window", "the mask is a sliding window", instead({"attention_mask": a.sliding_window}), OPS, at(MASK)
    ),
    Fault(
        "sliding window off by one",
        "the window is one token too wide",
        instead({"attention_mask": a.window_one_wider}),
        OPS,
        at(MASK),
        _has_window,
    ),
    Fault(
        "sliding window ignored",
        "the model's window is ignored",
        instead({"attention_mask": a.window_forgotten}),
        OPS,
        at(MASK),
        _has_window,
    ),
    Fault(
        "sliding window ignored",
        "the model's window is ignored",
        misread(sliding_window=None),
        OPS,
        at(MASK),
        _has_window,
        place="config",
    ),
    Fault(
        "documents not separated",
        "packed documents attend to each other",
        instead({"attention_mask": a.across_documents}),
        OPS,
        at(MASK),
    ),
    Fault(
        "mask value too small",
        "hidden scores are not low enough",
        _masked_by(a.mask_too_small),
        OPS,
        at(MASKED),
    ),
    Fault(
        "mask value too small",
        "hidden scores are not low enough",
        _masked_by(a.mask_of_gpt2),
        OPS,
        at(MASKED),
        place="-10,000",
        equivalent=lambda *_: "exp(-10,000) is zero in float32: no attention weight changes",
    ),
    Fault("mask multiplied", "the mask is multiplied with the scores", _masked_by(a.mask_of_zero), OPS, at(MASKED)),
    Fault("mask added as ones", "the mask is added as ones and zeros", _masked_by(a.mask_added), OPS, at(MASKED)),
    Fault("mask inverted", "the mask is inverted", _masked_by(a.mask_inverted), OPS, at(MASKED)),
)

SOFTMAX = (
    Fault(
        "softmax in low precision",
        "softmax is computed in bfloat16",
        instead({"softmax": a.softmax_in_bfloat16}),
        OPS,
        at(WEIGHTS),
        place="bfloat16",
    ),
    Fault(
        "softmax in low precision",
        "softmax is computed in float16",
        instead({"softmax": a.softmax_in_float16}),
        OPS,
        at(WEIGHTS),
        place="float16",
    ),
    Fault(
        "softmax over the wrong axis",
        "softmax runs over queries",
        instead({"softmax": a.softmax_over_queries}),
        OPS,
        at(WEIGHTS),
        place="queries",
    ),
    Fault(
        "softmax over the wrong axis",
        "softmax runs over heads",
        instead({"layers.1.attn.weights": a.softmax_over_heads}),
        OPS,
        at("layers.1.attn.weights"),
        place="heads",
    ),
    Fault(
        "softmax base 2",
        "softmax takes powers of 2",
        instead({"softmax": a.softmax_base_2}),
        OPS,
        at(WEIGHTS),
    ),
    Fault(
        "softmax with one more",
        "one is added to softmax's denominator",
        instead({"softmax": a.softmax_with_sink}),
        OPS,
        at(WEIGHTS),
    ),
    Fault(
        "softmax without its maximum",
        "softmax does not subtract the maximum",
        instead({"softmax": a.softmax_unshifted}),
        OPS,
        at(WEIGHTS),
        equivalent=lambda *_: "it changes rounding only, while scores stay below 88; these do",
    ),
)
