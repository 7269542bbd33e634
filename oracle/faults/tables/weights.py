"""Rows: wrong parameters. They must show in the rung bits, at the first module that holds one."""

from jaxgpt.config import ModelConfig
from oracle.faults import weights as w
from oracle.faults.fault import (
    Fault,
    at,
    has_mlp_bias,
    has_qkv_bias,
    has_rope,
    is_gated,
    is_learned,
    is_square,
    is_tied,
    is_untied,
)

BITS = "bits"
Q1, K1, V1, OUT1 = (f"layers.1.attn.{part}" for part in ("q", "k", "v", "out"))
UP1, DOWN1, GATE1 = (f"layers.1.mlp.{part}" for part in ("up", "down", "gate"))
NORM0, NORM1, MLP_NORM1 = "layers.0.attn_norm", "layers.1.attn_norm", "layers.1.mlp_norm"
Q0, K0, EMBED = "layers.0.attn.q", "layers.0.attn.k", "embed.tokens"


def _equal_heads(config: ModelConfig) -> bool:
    """Query and key have the same number of heads."""
    return config.num_attention_heads == config.num_key_value_heads


def _several_heads(config: ModelConfig) -> bool:
    """There are several key heads."""
    return config.num_key_value_heads > 1


def _equal_biases(config: ModelConfig) -> bool:
    """Query and key have biases of the same size."""
    return has_qkv_bias(config) and _equal_heads(config)


def _has_output_bias(config: ModelConfig) -> bool:
    """The output projection of attention has a bias."""
    return config.attention_output_bias


def _beyond_ten_layers(config: ModelConfig) -> bool:
    """There are more than ten layers."""
    return config.num_hidden_layers > 10


def _head(config: ModelConfig) -> str:
    return EMBED if is_tied(config) else "head"


LAYOUT = (
    Fault(
        "kernel transposed", "the kernel is transposed", w.edited(f"{Q1}.kernel", w.transposed), BITS, at(Q1), is_square
    ),
    Fault(
        "kernel transposed",
        "the kernel is transposed",
        w.edited(f"{OUT1}.kernel", w.transposed),
        BITS,
        at(OUT1),
        is_square,
        place="output projection",
    ),
    Fault(
        "kernel transposed",
        "the kernel is transposed",
        w.edited(f"{UP1}.kernel", w.transposed),
        BITS,
        at(UP1),
        place="not square",
    ),
    Fault(
        "kernel read in another memory order",
        "the kernel's buffer was reshaped instead of transposed",
        w.edited(f"{UP1}.kernel", w.wrong_memory_order),
        BITS,
        at(UP1),
    ),
    Fault(
        "qkv packing order",
        "the parts of the fused qkv matrix were taken in another order",
        w.packed_in_another_order,
        BITS,
        at(Q0),
        _equal_heads,
    ),
    Fault(
        "qkv packing order",
        "the fused qkv matrix is packed by head and was split as if by part",
        w.packed_by_group,
        BITS,
        at(Q0),
        _several_heads,
        place="by head",
    ),
    Fault(
        "query, key and value swapped",
        "key and value are swapped",
        w.swapped(K1, V1),
        BITS,
        at(K1),
        place="key and value",
    ),
    Fault(
        "query, key and value swapped",
        "query and key are swapped",
        w.swapped(Q1, K1),
        BITS,
        at(Q1),
        _equal_heads,
        place="query and key",
    ),
    Fault(
        "query and key not permuted for RoPE",
        "the columns of query and key have RoPE's pairs side by side",
        w.edited_where(lambda n: ".attn.q." in n or ".attn.k." in n, w.interleaved_columns),
        BITS,
        at(Q0),
        has_rope,
    ),
    Fault(
        "key and value heads in another order",
        "the heads of key and value are in another order",
        w.edited_where(lambda n: ".attn.k." in n or ".attn.v." in n, w.heads_reversed),
        BITS,
        at(K0),
        _several_heads,
    ),
    Fault(
        "value heads permuted",
        "the value's heads are permuted",
        w.edited_where(lambda n: n.startswith(f"{V1}."), w.heads_rolled),
        BITS,
        at(V1),
        _several_heads,
    ),
    Fault(
        "embedding rows shifted",
        "the rows of the embedding are shifted by one",
        w.edited(f"{EMBED}.weight", w.rows_shifted),
        BITS,
        at(EMBED),
    ),
    Fault(
        "position table shifted",
        "the rows of the position table are shifted by one",
        w.edited("embed.positions.weight", w.rows_shifted),
        BITS,
        at("embed.positions"),
        is_learned,
    ),
)

PLACES = (
    Fault(
        "layers in lexicographic order",
        "layers were loaded in lexicographic order",
        w.renamed(w.lexicographic),
        BITS,
        at("layers.2.attn_norm"),
        _beyond_ten_layers,
    ),
    Fault(
        "layers in reverse order",
        "the layers' parameters are in another order",
        w.renamed(w.reversed_layers),
        BITS,
        at(NORM0),
    ),
    Fault(
        "tensor of another layer",
        "the tensor is that of another layer",
        w.copied("layers.0.mlp.down", DOWN1),
        BITS,
        at(DOWN1),
    ),
    Fault(
        "norm weights swapped",
        "the norms of a block are swapped",
        w.swapped(NORM1, MLP_NORM1),
        BITS,
        at(NORM1),
    ),
    Fault(
        "gate and up swapped",
        "gate and up are swapped",
        w.swapped(GATE1, UP1),
        BITS,
        at(GATE1),
        is_gated,
        place="weights",
    ),
    Fault("head untied and random", "the tied head is a tensor of its own", w.untied_random, BITS, at("head"), is_tied),
    Fault("head wrongly tied", "the head is tied to the embedding", w.wrongly_tied, BITS, at("head"), is_untied),
    Fault(
        "head with the wrong sign or scale",
        "the head has the wrong sign",
        w.edited("head.weight", w.negated),
        BITS,
        at("head"),
        is_untied,
        place="weights, sign",
    ),
    Fault(
        "head with the wrong sign or scale",
        "the embedding is scaled",
        w.edited(f"{EMBED}.weight", w.scaled_by_width),
        BITS,
        at(EMBED),
        is_tied,
        place="weights, scale",
    ),
    Fault(
        "bias dropped",
        "the bias is zero",
        w.edited(f"{OUT1}.bias", w.zero),
        BITS,
        at(OUT1),
        _has_output_bias,
        place="zero",
    ),
    Fault("bias dropped", "the bias is missing", w.without(f"{Q1}.bias"), BITS, at(Q1), has_qkv_bias, place="missing"),
    Fault(
        "bias dropped",
        "the bias is missing",
        w.without(f"{UP1}.bias"),
        BITS,
        at(UP1),
        has_mlp_bias,
        place="missing in the MLP",
    ),
    Fault(
        "bias of another module",
        "query and key biases are swapped",
        w.renamed(lambda _: {Q1: K1, K1: Q1}, ("bias",)),
        BITS,
        at(Q1),
        _equal_biases,
    ),
    Fault(
        "bias with the wrong sign",
        "the key bias has the wrong sign",
        w.edited(f"{K1}.bias", w.negated),
        BITS,
        at(K1),
        has_qkv_bias,
    ),
)

VALUES = (
    Fault(
        "bf16 bits read as fp16",
        "bfloat16 bits were read as float16",
        w.bf16_read_as_fp16(f"{V1}.kernel"),
        BITS,
        at(V1),
    ),
    Fault(
        "bytes in another order",
        "the bytes of each number are in the opposite order",
        w.byte_order(f"{DOWN1}.kernel"),
        BITS,
        at(DOWN1),
    ),
    Fault("one bit flipped", "a single number differs", w.flipped_bit(f"{DOWN1}.kernel"), BITS, at(DOWN1)),
    Fault("one NaN", "the tensor holds NaN", w.edited(f"{UP1}.kernel", w.one_nan), BITS, at(UP1)),
    Fault(
        "tensor left at its random init",
        "the tensor was never loaded: it is random",
        w.edited(f"{UP1}.kernel", w.random_init),
        BITS,
        at(UP1),
    ),
    Fault(
        "tensor left at its random init",
        "the tensor was never loaded: it is random",
        w.edited(f"{K1}.kernel", w.random_init),
        BITS,
        at(K1),
        place="key",
    ),
    Fault(
        "tensor never filled",
        "the tensor was never loaded: it is zero",
        w.edited(f"{DOWN1}.kernel", w.zero),
        BITS,
        at(DOWN1),
    ),
    Fault(
        "weights of another revision",
        "the weights are of another revision",
        w.edited_where(lambda _: True, w.other_revision),
        BITS,
        at(EMBED),
    ),
    Fault(
        "adapter not merged",
        "the attention weights differ by a low-rank update",
        w.edited_where(lambda n: n.endswith((".attn.q.kernel", ".attn.v.kernel")), w.low_rank_update),
        BITS,
        at(Q0),
    ),
    Fault(
        "weights quantised",
        "the weights were quantised to int8",
        w.edited_where(w.is_kernel, w.through_int8),
        BITS,
        at(Q0),
    ),
    Fault(
        "weights rounded",
        "the weights were rounded to bfloat16",
        w.edited_where(lambda _: True, w.through_bfloat16),
        BITS,
        at(EMBED),
        place="bfloat16",
        equivalent=lambda _, dtype: "" if dtype == "float32" else "the file holds bfloat16 already",
    ),
    Fault(
        "weights rounded",
        "the weights were rounded to float16",
        w.edited_where(w.is_kernel, w.through_float16),
        BITS,
        at(Q0),
        dtypes=("float32",),
        place="float16",
    ),
    Fault(
        "(1 + w) handling",
        "norm weights are stored as their distance from 1",
        w.edited_where(lambda n: "norm" in n and n.endswith("weight"), w.minus_one),
        BITS,
        at(NORM0),
        place="weights",
    ),
    Fault(
        "padded vocabulary rows live",
        "the padded rows of the vocabulary are random",
        lambda candidate: w.live_padding(_head(candidate.config))(candidate),
        BITS,
        _head,
    ),
)

WEIGHTS = (*LAYOUT, *PLACES, *VALUES)
