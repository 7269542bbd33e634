"""Rows: wrong ops outside attention. They must show in the rung operators, at the first op of their kind."""

from jaxgpt.config import ModelConfig
from oracle.faults import ops as o
from oracle.faults.fault import (
    Fault,
    at,
    has_mlp_bias,
    has_qkv_bias,
    instead,
    is_gated,
    is_layernorm,
    is_learned,
    is_rmsnorm,
    is_tied,
    misread,
)

OPS = "operators"
EMBED, NORM0, ACT0, LOGITS = "embed.tokens", "layers.0.attn_norm", "layers.0.mlp.act", "logits"
FP32 = ("float32",)


def _plain(config: ModelConfig) -> bool:
    """The MLP has no gate."""
    return not config.gated_mlp


def _acts(*names: str):
    def applies(config: ModelConfig) -> bool:
        return _plain(config) and config.hidden_act in names

    applies.__doc__ = f"The MLP has no gate and its activation is {' or '.join(names)}."
    return applies


def _in_bf16(reason: str):
    return lambda _, dtype: reason if dtype == "bfloat16" else ""


EMBEDDING = (
    Fault(
        "embedding scaled",
        "the embedding is multiplied by sqrt(D)",
        instead({EMBED: o.embedding_scaled}),
        OPS,
        at(EMBED),
    ),
    Fault(
        "position ids off by one",
        "positions are counted from 1",
        instead({"embed.positions": o.position_after}),
        OPS,
        at("embed.positions"),
        is_learned,
        place="learned",
    ),
)

NORMS = (
    Fault(
        "norm epsilon",
        "the norm's epsilon is ten times too small",
        instead({"norm": o.tenth_of_epsilon}),
        OPS,
        at(NORM0),
    ),
    Fault(
        "norm epsilon",
        "the norm's epsilon is another one",
        misread(rms_norm_eps=3e-5),
        OPS,
        at(NORM0),
        place="config",
    ),
    Fault("norm epsilon", "the norm has no epsilon", instead({"norm": o.no_epsilon}), OPS, at(NORM0), place="none"),
    Fault(
        "norm epsilon outside the root",
        "epsilon is added outside the square root",
        instead({"norm": o.epsilon_outside}),
        OPS,
        at(NORM0),
    ),
    Fault(
        "norm in bfloat16",
        "the norm is computed in bfloat16",
        instead({"norm": o.norm_in_bfloat16}),
        OPS,
        at(NORM0),
    ),
    Fault(
        "LayerNorm for RMSNorm",
        "the norm subtracts the mean",
        instead({"norm": o.mean_subtracted}),
        OPS,
        at(NORM0),
        is_rmsnorm,
    ),
    Fault(
        "LayerNorm for RMSNorm",
        "the norm does not subtract the mean",
        instead({"norm": o.mean_kept}),
        OPS,
        at(NORM0),
        is_layernorm,
        place="the other way round",
    ),
    Fault(
        "norm with unbiased variance",
        "the norm divides by D - 1",
        instead({"norm": o.unbiased_variance}),
        OPS,
        at(NORM0),
    ),
    Fault(
        "norm without weight",
        "the norm's weight is not applied",
        instead({"layers.1.attn_norm": o.norm_without_weight}),
        OPS,
        at("layers.1.attn_norm"),
    ),
    Fault(
        "norm without bias",
        "the norm's bias is not added",
        instead({"layers.1.mlp_norm": o.norm_without_bias}),
        OPS,
        at("layers.1.mlp_norm"),
        is_layernorm,
    ),
    Fault(
        "(1 + w) handling",
        "the norm multiplies by 1 + weight",
        instead({"norm": o.one_plus_weight}),
        OPS,
        at(NORM0),
        place="op",
    ),
    Fault(
        "final norm missing",
        "the final norm is missing",
        instead({"final_norm": o.identity}),
        OPS,
        at("final_norm"),
        place="op",
    ),
    Fault(
        "norm missing",
        "a norm is missing",
        instead({"layers.1.mlp_norm": o.identity}),
        OPS,
        at("layers.1.mlp_norm"),
    ),
)

PROJECTIONS = (
    Fault(
        "bias dropped",
        "the bias is not added",
        instead({"layers.1.attn.q": o.projection_without_bias}),
        OPS,
        at("layers.1.attn.q"),
        has_qkv_bias,
        place="op",
    ),
    Fault(
        "bias added twice",
        "the bias is added twice",
        instead({"layers.1.mlp.down": o.bias_twice}),
        OPS,
        at("layers.1.mlp.down"),
        has_mlp_bias,
    ),
    Fault(
        "matrix product in bfloat16",
        "the matrix product is computed in bfloat16",
        instead({"layers.1.mlp.down": o.product_in_bfloat16}),
        OPS,
        at("layers.1.mlp.down"),
        equivalent=_in_bf16("a bfloat16 model's products are in bfloat16"),
    ),
    Fault(
        "activations through float16",
        "the activations are rounded to float16",
        instead({"layers.1.mlp.up": o.through_float16}),
        OPS,
        at("layers.1.mlp.up"),
        equivalent=_in_bf16("float16 holds every bfloat16 between 2**-14 and 65,504, and all of these are"),
    ),
    Fault(
        "activations through float8",
        "the activations are rounded to float8",
        instead({"layers.1.attn.out": o.through_float8}),
        OPS,
        at("layers.1.attn.out"),
    ),
    Fault(
        "logits in bfloat16",
        "the logits are rounded to bfloat16",
        instead({LOGITS: o.head_in_bfloat16}),
        OPS,
        at(LOGITS),
    ),
    Fault(
        "head with the wrong sign or scale",
        "the head has the wrong sign",
        instead({"head": o.head_negated}),
        OPS,
        at(LOGITS),
        place="sign",
    ),
    Fault(
        "head with the wrong sign or scale",
        "the tied head is scaled by 1 / sqrt(D)",
        instead({"head": o.head_scaled_by_width}),
        OPS,
        at(LOGITS),
        is_tied,
        place="scale",
    ),
    Fault("logits scaled", "the logits are scaled", instead({"head": o.logits_divided}), OPS, at(LOGITS)),
    Fault("logits capped", "the logits are soft-capped", instead({"head": o.logits_capped}), OPS, at(LOGITS)),
)

MLP = (
    Fault(
        "GELU erf or tanh",
        "the exact GELU instead of the tanh approximation",
        instead({"activation": o.erf_gelu}),
        OPS,
        at(ACT0),
        _acts("gelu_new"),
        place="exact",
    ),
    Fault(
        "GELU erf or tanh",
        "the tanh approximation instead of the exact GELU",
        instead({"activation": o.tanh_gelu}),
        OPS,
        at(ACT0),
        _acts("gelu"),
        place="tanh",
    ),
    Fault(
        "GELU erf or tanh",
        "the exact GELU instead of the tanh approximation",
        misread(hidden_act="gelu"),
        OPS,
        at(ACT0),
        _acts("gelu_new"),
        place="config",
    ),
    Fault(
        "quick GELU", "x sigmoid(1.702 x) instead of GELU", instead({"activation": o.quick_gelu}), OPS, at(ACT0), _plain
    ),
    Fault(
        "another activation",
        "SiLU instead of GELU",
        instead({"activation": o.silu}),
        OPS,
        at(ACT0),
        _plain,
        place="SiLU",
    ),
    Fault(
        "another activation",
        "ReLU instead of GELU",
        instead({"activation": o.relu}),
        OPS,
        at(ACT0),
        _plain,
        place="ReLU",
    ),
    Fault(
        "another activation",
        "GELU instead of SiLU in the gate",
        instead({"gated_activation": o.gelu_gate}),
        OPS,
        at(ACT0),
        is_gated,
        place="GeGLU",
    ),
    Fault(
        "another activation",
        "sigmoid instead of SiLU in the gate",
        instead({"gated_activation": o.sigmoid_gate}),
        OPS,
        at(ACT0),
        is_gated,
        place="GLU",
    ),
    Fault(
        "gate and up swapped",
        "gate and up are swapped",
        instead({"gated_activation": o.gate_and_up_swapped}),
        OPS,
        at(ACT0),
        is_gated,
        place="op",
    ),
    Fault(
        "activation of the product",
        "the activation is applied to gate times up",
        instead({"gated_activation": o.activated_product}),
        OPS,
        at(ACT0),
        is_gated,
    ),
    Fault(
        "activation missing",
        "the gate has no activation",
        instead({"gated_activation": o.linear_gate}),
        OPS,
        at(ACT0),
        is_gated,
        place="gate",
    ),
    Fault(
        "activation missing",
        "the MLP has no activation",
        instead({"layers.1.mlp.act": o.identity}),
        OPS,
        at("layers.1.mlp.act"),
        _plain,
    ),
)

RESIDUAL = (
    Fault(
        "residual added twice",
        "the residual stream is added twice",
        instead({"layers.1.attn_residual": o.residual_twice}),
        OPS,
        at("layers.1.attn_residual"),
    ),
    Fault(
        "block contributes nothing",
        "the branch is not added to the stream",
        instead({"layers.1.mlp_residual": o.branch_lost}),
        OPS,
        at("layers.1.mlp_residual"),
    ),
    Fault(
        "no skip connection",
        "the stream is not added to the branch",
        instead({"layers.1.mlp_residual": o.stream_lost}),
        OPS,
        at("layers.1.mlp_residual"),
    ),
    Fault(
        "residual scaled",
        "the branch is scaled before it is added",
        instead({"layers.1.attn_residual": o.residual_scaled}),
        OPS,
        at("layers.1.attn_residual"),
    ),
    Fault(
        "residual stream in float16",
        "the residual stream is rounded to float16",
        instead({"layers.1.attn_residual": o.residual_in_float16}),
        OPS,
        at("layers.1.attn_residual"),
        dtypes=FP32,
    ),
)

OPERATORS = (*EMBEDDING, *NORMS, *PROJECTIONS, *MLP, *RESIDUAL)
