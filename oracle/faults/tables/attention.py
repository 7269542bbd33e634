"""Rows: wrong ops of attention. They must show in the rung operators, at the first op of their kind."""

from math import gcd

from jaxgpt.config import ModelConfig
from oracle.candidate import Candidate
from oracle.faults import attention as a
from oracle.faults import ops as o
from oracle.faults.fault import Fault, at, has_rope, instead, is_grouped, is_learned, misread, query_tap
from oracle.faults.tables.masks import MASKS, SOFTMAX

OPS = "operators"
ANGLES = "rope.angles"
Q_HEADS, K_HEADS = "layers.0.attn.q_heads", "layers.0.attn.k_heads"
SCORES, CONTEXT = "layers.0.attn.scores", "layers.0.attn.context"


def _scaled(kind: str):
    def applies(config: ModelConfig) -> bool:
        return config.rope_scaling is not None and config.rope_scaling.rope_type == kind

    applies.__doc__ = f"RoPE is scaled, by the rule {kind}."
    return applies


def _has_qk_norm(config: ModelConfig) -> bool:
    """The heads of queries and keys are normalised."""
    return config.qk_norm


def _is_scaled(config: ModelConfig) -> bool:
    """RoPE is scaled."""
    return config.rope_scaling is not None


def _is_plain_rope(config: ModelConfig) -> bool:
    """Positions are rotations without a scaling."""
    return has_rope(config) and not _is_scaled(config)


def _several_heads(config: ModelConfig) -> bool:
    """There are several key heads."""
    return config.num_key_value_heads > 1


def _free_width(config: ModelConfig) -> bool:
    """The heads together are wider or narrower than the model."""
    return config.num_attention_heads * config.head_dim != config.hidden_size


def _ungrouped(config: ModelConfig, dtype: str) -> str:
    if is_grouped(config):
        return ""
    return "one query head per key head, or one key head: repeating and tiling are the same"


def _fewer_heads(candidate: Candidate) -> Candidate:
    c = candidate.config
    by = _common_factor(c)
    return misread(
        num_attention_heads=c.num_attention_heads // by,
        num_key_value_heads=c.num_key_value_heads // by,
        head_dim=c.head_dim * by,
    )(candidate)


def _common_factor(config: ModelConfig) -> int:
    common = gcd(config.num_attention_heads, config.num_key_value_heads)
    return next((factor for factor in (2, 3, 5) if common % factor == 0), 1)


def _has_common_factor(config: ModelConfig) -> bool:
    """The numbers of query and key heads have a common factor."""
    return _common_factor(config) > 1


HEADS = (
    Fault(
        "number of heads",
        "the model has another number of heads",
        _fewer_heads,
        OPS,
        lambda config: ANGLES if has_rope(config) else Q_HEADS,
        _has_common_factor,
    ),
    Fault(
        "heads split without transposing",
        "heads are split without transposing time and heads",
        instead({"split_query_heads": a.split_without_transposing}),
        OPS,
        at(Q_HEADS),
    ),
    Fault(
        "heads split width first",
        "the width of the heads is split as (H, N)",
        instead({"split_query_heads": a.split_width_first, "split_kv_heads": a.split_width_first}),
        OPS,
        at(Q_HEADS),
    ),
    Fault(
        "key and value heads in another order",
        "key and value heads are counted from the end",
        instead({"split_kv_heads": a.split_in_reverse}),
        OPS,
        at(K_HEADS),
        _several_heads,
        place="op",
    ),
    Fault(
        "queries normalised",
        "the queries are normalised",
        instead({"split_query_heads": a.split_and_normalised}),
        OPS,
        at(Q_HEADS),
    ),
    Fault(
        "heads merged without transposing",
        "heads are merged without transposing time and heads",
        instead({"merge_heads": a.merged_without_transposing}),
        OPS,
        at("layers.0.attn.merged"),
    ),
)

QK_NORMS = (
    Fault(
        "q_norm skipped",
        "queries are not normalised",
        instead({"layers.1.attn.q_norm": o.identity}),
        OPS,
        at("layers.1.attn.q_norm"),
        _has_qk_norm,
    ),
    Fault(
        "q_norm skipped",
        "neither queries nor keys are normalised",
        instead({f"layers.{layer}.attn.{side}_norm": o.identity for layer in (0, 1) for side in "qk"}),
        OPS,
        at("layers.0.attn.q_norm"),
        _has_qk_norm,
        place="keys as well",
    ),
    Fault(
        "heads normalised together",
        "all heads of a token are normalised together",
        instead({"layers.0.attn.q_norm": a.heads_normalised_together}),
        OPS,
        at("layers.0.attn.q_norm"),
        _has_qk_norm,
    ),
)

ROTATION = (
    Fault("RoPE interleaved", "RoPE pairs are interleaved", instead({"rope": a.interleaved}), OPS, query_tap, has_rope),
    Fault("RoPE backwards", "RoPE turns the wrong way", instead({"rope": a.backwards}), OPS, query_tap, has_rope),
    Fault(
        "RoPE sine and cosine exchanged",
        "sine and cosine are exchanged",
        instead({"rope": a.cosine_for_sine}),
        OPS,
        query_tap,
        has_rope,
    ),
    Fault(
        "RoPE on part of the head",
        "RoPE turns half of the head's width",
        instead({"rope": a.half_rotated}),
        OPS,
        query_tap,
        has_rope,
    ),
    Fault(
        "RoPE on keys only",
        "queries are not rotated",
        instead({"layers.1.attn.q_rope": o.identity}),
        OPS,
        at("layers.1.attn.q_rope"),
        has_rope,
    ),
    Fault(
        "RoPE in bfloat16",
        "the rotation is computed in bfloat16",
        instead({"rope": a.rotated_in_bfloat16}),
        OPS,
        query_tap,
        has_rope,
    ),
    Fault(
        "RoPE theta",
        "RoPE's theta is another one",
        misread(rope_theta=20000.0),
        OPS,
        at(ANGLES),
        has_rope,
        place="config",
    ),
    Fault(
        "RoPE theta",
        "RoPE's theta is another one",
        instead({"angles": a.angles_of_another_theta}),
        OPS,
        at(ANGLES),
        _is_plain_rope,
        place="another family's",
    ),
    Fault(
        "RoPE theta",
        "RoPE's theta is another one",
        misread(rope_theta=20000.0),
        OPS,
        at(ANGLES),
        is_learned,
        place="no RoPE",
        equivalent=lambda *_: "the model has no RoPE: nothing reads the theta",
    ),
    Fault(
        "RoPE scaling ignored",
        "rope_scaling is ignored",
        instead({"angles": a.angles_unscaled}),
        OPS,
        at(ANGLES),
        _is_scaled,
    ),
    Fault(
        "RoPE scaling ignored",
        "rope_scaling is ignored",
        misread(rope_scaling=None),
        OPS,
        at(ANGLES),
        _is_scaled,
        place="config",
    ),
    Fault(
        "yarn factor ignored",
        "yarn's scaling of frequencies is ignored",
        instead({"angles": a.angles_unscaled}),
        OPS,
        at(ANGLES),
        _scaled("yarn"),
    ),
    Fault(
        "yarn attention factor ignored",
        "cosines and sines are not multiplied by yarn's attention factor",
        instead({"rope": a.rotated_without_magnitude}),
        OPS,
        query_tap,
        _scaled("yarn"),
    ),
    Fault(
        "RoPE scaling of another kind",
        "yarn scaling is taken for linear",
        instead({"angles": a.angles_all_divided}),
        OPS,
        at(ANGLES),
        _scaled("yarn"),
        place="yarn",
    ),
    Fault(
        "RoPE scaling of another kind",
        "llama3 scaling is taken for linear",
        instead({"angles": a.angles_all_divided}),
        OPS,
        at(ANGLES),
        _scaled("llama3"),
    ),
    Fault(
        "RoPE of the model's width",
        "RoPE's exponents are divided by D",
        instead({"angles": a.angles_of_model_width}),
        OPS,
        at(ANGLES),
        _is_plain_rope,
    ),
    Fault(
        "RoPE angles in bfloat16",
        "RoPE's angles are computed in bfloat16",
        instead({"angles": a.angles_in_bfloat16}),
        OPS,
        at(ANGLES),
        has_rope,
    ),
    Fault(
        "RoPE positions doubled",
        "positions are doubled",
        instead({"angles": a.angles_doubled}),
        OPS,
        at(ANGLES),
        has_rope,
    ),
    Fault(
        "position ids off by one",
        "positions are counted from 1",
        instead({"angles": a.angles_after}),
        OPS,
        at(ANGLES),
        has_rope,
        place="RoPE",
    ),
)

PRODUCTS = (
    Fault(
        "GQA repeat against tile",
        "key heads are tiled instead of repeated",
        instead({"scores": a.tiled_scores, "context": a.tiled_context}),
        OPS,
        at(SCORES),
        equivalent=_ungrouped,
    ),
    Fault(
        "GQA repeat against tile",
        "value heads are tiled instead of repeated",
        instead({"context": a.tiled_context}),
        OPS,
        at(CONTEXT),
        is_grouped,
        place="values only",
    ),
    Fault(
        "attention scale missing",
        "scores are not divided by sqrt(H)",
        instead({"scores": a.unscaled_scores}),
        OPS,
        at(SCORES),
    ),
    Fault(
        "attention scaled twice",
        "scores are divided by sqrt(H) twice",
        instead({"scores": a.twice_scaled_scores}),
        OPS,
        at(SCORES),
    ),
    Fault(
        "attention scale of another width",
        "scores are divided by sqrt(D)",
        instead({"scores": a.scores_of_model_width}),
        OPS,
        at(SCORES),
        place="D",
    ),
    Fault(
        "attention scale of another width",
        "scores are divided by sqrt(D / N)",
        instead({"scores": a.scores_by_quotient}),
        OPS,
        at(SCORES),
        _free_width,
        place="D / N",
    ),
    Fault("scores capped", "the scores are soft-capped", instead({"scores": a.capped_scores}), OPS, at(SCORES)),
    Fault(
        "ALiBi added", "the scores have a bias of distance", instead({"scores": a.scores_with_slopes}), OPS, at(SCORES)
    ),
    Fault(
        "scores in bfloat16",
        "the scores are computed in bfloat16",
        instead({"scores": a.scores_in_bfloat16}),
        OPS,
        at(SCORES),
    ),
    Fault(
        "weights of attention in bfloat16",
        "the attention weights are rounded to bfloat16",
        instead({"context": a.context_of_bfloat16}),
        OPS,
        at(CONTEXT),
        equivalent=lambda _, dtype: "a bfloat16 model rounds them anyway" if dtype == "bfloat16" else "",
    ),
    Fault(
        "values summed over queries",
        "the weighted sum runs over queries instead of keys",
        instead({"layers.1.attn.context": a.context_transposed}),
        OPS,
        at("layers.1.attn.context"),
    ),
)

ATTENTION = (*HEADS, *QK_NORMS, *ROTATION, *PRODUCTS, *MASKS, *SOFTMAX)
