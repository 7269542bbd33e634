"""The rows. A row's place decides which model it is planted in: new ones go to the end."""

from collections.abc import Callable

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from oracle.faults.decoding import kept, stepping, with_op
from oracle.faults.fault import (
    BOTH,
    TEXT,
    Condition,
    Fault,
    Plant,
    at,
    everywhere,
    has_rope,
    instead,
    is_learned,
    is_tied,
    position_tap,
    query_tap,
)
from oracle.faults.held_out import attention as a
from oracle.faults.held_out import decoding as d
from oracle.faults.held_out import ops as o
from oracle.faults.held_out import optimizer as s
from oracle.faults.held_out import parameters as p
from oracle.faults.held_out import text as x
from oracle.faults.held_out import training as t
from oracle.faults.held_out import wiring as w
from oracle.faults.names import NAMES
from oracle.faults.text import spoken
from oracle.faults.training import Recipe, Rules, learning, optimized, packed
from oracle.faults.weights import edited
from oracle.faults.wiring import rewired

OPS, BITS, FORWARD, DECODE = "operators", "bits", "forward", "decode"
IDS, LOSS, GRADIENTS, OPTIMIZER = "ids", "loss", "gradients", "optimizer"
FP32 = ("float32",)
KEYS0, EMBEDDING = "layers.0.attn.keys", "embed.tokens.weight"


def _unlisted(
    name: str,
    plant: Plant,
    rung: str,
    tap: str | Callable[[ModelConfig], str],
    applies: Condition = everywhere,
    *,
    dtypes: tuple[str, ...] = BOTH,
    needs: str = "",
) -> Fault:
    where = at(tap) if isinstance(tap, str) else tap
    names = frozenset(NAMES.get(name, ()))
    return Fault(name, name, plant, rung, where, applies, names=names, dtypes=dtypes, needs=needs)


def _last_mlp(config: ModelConfig) -> str:
    return f"layers.{config.num_hidden_layers - 1}.mlp."


def _last_of(config: ModelConfig, module: str) -> str:
    """Gradients are compared from the head back: a module's bias before its kernel."""
    return [q.name for q in weights.parameters(config) if q.name.startswith(module)][-1]


def _activated(config: ModelConfig) -> str:
    return _last_of(config, _last_mlp(config) + ("gate." if config.gated_mlp else "up."))


FIRST: tuple[Fault, ...] = (
    _unlisted("column of zeros", edited("layers.1.mlp.up.kernel", p.column_zeroed), BITS, "layers.1.mlp.up"),
    _unlisted("rows sorted", edited("layers.0.attn.out.kernel", p.rows_sorted), BITS, "layers.0.attn.out"),
    _unlisted("signs in a checkerboard", edited("layers.1.attn.k.kernel", p.checkerboard), BITS, "layers.1.attn.k"),
    _unlisted(
        "values through tanh", instead({"layers.1.attn.v_heads": a.values_through_tanh}), OPS, "layers.1.attn.v_heads"
    ),
    _unlisted("one head sharper", instead({"scores": a.second_head_doubled}), OPS, "layers.0.attn.scores"),
    _unlisted("theta bends at 20", instead({"angles": a.bent_theta}), OPS, "rope.angles", has_rope),
    _unlisted("ReLU behind the norm", instead({"layers.1.mlp_norm": o.rectified_norm}), OPS, "layers.1.mlp_norm"),
    _unlisted("keys rolled", instead({"layers.1.attn.scores": a.keys_rolled}), OPS, "layers.1.attn.scores"),
    _unlisted("weights squared", instead({"softmax": a.squared_weights}), OPS, "layers.0.attn.weights"),
    _unlisted("small weights dropped", instead({"softmax": a.thresholded_weights}), OPS, "layers.0.attn.weights"),
    _unlisted(
        "weights in steps", instead({"layers.1.attn.weights": a.quantised_weights}), OPS, "layers.1.attn.weights"
    ),
    _unlisted("slot 0 weighs more", instead({"context": a.first_token_weighs_more}), OPS, "layers.0.attn.context"),
    _unlisted("alternating signs", instead({"merge_heads": a.alternating_signs}), OPS, "layers.0.attn.merged"),
    _unlisted("clipped activation", instead({"layers.1.mlp.act": o.clipped_activation}), OPS, "layers.1.mlp.act"),
    _unlisted("leaking residual", instead({"layers.0.mlp_residual": o.smeared_residual}), OPS, "layers.0.mlp_residual"),
    _unlisted("every ninth logit", instead({"head": o.every_ninth_logit}), OPS, "logits"),
    _unlisted("slot 3 hidden", instead({"attention_mask": a.third_token_hidden}), OPS, "mask"),
    _unlisted(
        "MLP of another layer's norm",
        rewired(w.gate_from_attention),
        FORWARD,
        lambda config: f"layers.{config.num_hidden_layers - 1}.mlp.{'gate' if config.gated_mlp else 'up'}",
    ),
    _unlisted("every fourth slot empty", kept(d.forgets_every_fourth), DECODE, "layers.0.attn.keys"),
    _unlisted("odd rows two behind", stepping(d.odd_rows_wait), DECODE, position_tap),
)

PARAMETERS = (
    _unlisted(
        "shards joined in another order",
        edited("layers.0.mlp.down.kernel", p.inner_shards_exchanged),
        BITS,
        "layers.0.mlp.down",
    ),
    _unlisted("one shard loaded twice", edited("layers.1.mlp.up.kernel", p.first_shard_twice), BITS, "layers.1.mlp.up"),
    _unlisted(
        "outliers saturated", edited("layers.1.attn.out.kernel", p.outliers_saturated), BITS, "layers.1.attn.out"
    ),
    _unlisted(
        "chunk at another offset", edited("layers.0.attn.v.kernel", p.chunk_at_another_offset), BITS, "layers.0.attn.v"
    ),
    _unlisted("small weights pruned", edited("layers.0.mlp.up.kernel", p.pruned), BITS, "layers.0.mlp.up"),
    _unlisted("layers averaged", p.averaged_over_layers("mlp.up.kernel"), BITS, "layers.0.mlp.up"),
)

OPERATORS = (
    _unlisted("last ids share a row", instead({"embed.tokens": o.ids_clipped}), OPS, "embed.tokens"),
    _unlisted(
        "positions in five bits", instead({"embed.positions": o.positions_wrap}), OPS, "embed.positions", is_learned
    ),
    _unlisted("norm over the sequence", instead({"norm": o.normed_over_sequence}), OPS, "layers.0.attn_norm"),
    _unlisted(
        "remainder of tiles dropped",
        instead({"layers.0.attn.v": o.remainder_of_tiles_dropped}),
        OPS,
        "layers.0.attn.v",
    ),
    _unlisted(
        "remainder not activated", instead({"layers.0.mlp.act": o.remainder_not_activated}), OPS, "layers.0.mlp.act"
    ),
    _unlisted(
        "first token without its branch",
        instead({"layers.1.attn_residual": o.first_token_without_branch}),
        OPS,
        "layers.1.attn_residual",
    ),
    _unlisted("head of unit rows", instead({"head": o.head_of_unit_rows}), OPS, "logits"),
)

ATTENTION = (
    _unlisted(
        "one frequency for all pairs", instead({"angles": a.every_pair_of_the_last}), OPS, "rope.angles", has_rope
    ),
    _unlisted("angles of row 0", instead({"rope": a.angles_of_first_row}), OPS, query_tap, has_rope),
    _unlisted("keys of row 0", instead({"layers.1.attn.k_heads": a.heads_of_first_row}), OPS, "layers.1.attn.k_heads"),
    _unlisted("merged in row 0 only", instead({"merge_heads": a.merged_in_first_row}), OPS, "layers.0.attn.merged"),
    _unlisted("last head stale", instead({"scores": a.last_head_stale}), OPS, "layers.0.attn.scores"),
    _unlisted(
        "query heads counted from 1", instead({"layers.1.attn.scores": a.group_one_off}), OPS, "layers.1.attn.scores"
    ),
    _unlisted("causal in blocks", instead({"attention_mask": a.causal_in_blocks}), OPS, "mask"),
    _unlisted("segments in one bit", instead({"attention_mask": a.segments_in_one_bit}), OPS, "mask"),
    _unlisted("online softmax not rescaled", instead({"softmax": a.sum_not_rescaled}), OPS, "layers.0.attn.weights"),
    _unlisted("edges of blocks twice", instead({"context": a.block_edges_twice}), OPS, "layers.0.attn.context"),
)

WIRING = (
    _unlisted("residual not renewed", rewired(w.residual_not_renewed), FORWARD, "layers.0.mlp_residual"),
    _unlisted("last output projection for all", rewired(w.last_output_projection), FORWARD, "layers.0.attn.out"),
    _unlisted("keys of a stale norm", rewired(w.keys_of_a_stale_norm), FORWARD, "layers.1.attn.k"),
    _unlisted("given positions ignored", w.positions_ignored, FORWARD, position_tap),
)

DECODING = (
    _unlisted("last layer's cache for all", kept(d.last_layer_for_all), DECODE, KEYS0),
    _unlisted("stored in row 0's slot", d.stored_by_first_row, DECODE, KEYS0),
    _unlisted("first head stored only", with_op("store", d.first_head_stored), DECODE, KEYS0),
    _unlisted("stored keys turned on", stepping(d.keys_turned_on), DECODE, KEYS0, has_rope),
    _unlisted("mask of the shortest row", with_op("attention_mask", d.sees_as_far_as_the_shortest), DECODE, "mask"),
    _unlisted("chunks of a prompt apart", with_op("attention_mask", d.chunks_apart), DECODE, "mask"),
)

LEARNING = (
    _unlisted("targets of the batch before", t.stale_targets, LOSS, "batch.targets"),
    _unlisted("labels shifted inside shards", packed(t.shifted_inside_shards), LOSS, "batch.targets"),
    _unlisted("losses capped", learning(Recipe(tokens=t.capped)), LOSS, "loss.tokens"),
    _unlisted(
        "tokens counted in the first micro-batch", learning(Recipe(divisor=t.tokens_of_first)), LOSS, "loss.mean"
    ),
    _unlisted(
        "norm's scale detached",
        t.backward(("norm", t.scale_detached)),
        GRADIENTS,
        lambda config: _last_of(config, _last_mlp(config)),
    ),
    _unlisted(
        "activation with ReLU's gradient",
        t.backward(("activation", t.rectified_backward), ("gated_activation", t.rectified_backward)),
        GRADIENTS,
        _activated,
    ),
    _unlisted(
        "tied embedding learns as the head only",
        t.backward(("embed.tokens", t.lookup_detached)),
        GRADIENTS,
        EMBEDDING,
        is_tied,
    ),
    _unlisted(
        "last write of the embedding's gradient",
        t.backward(("embed.tokens", t.last_write_kept)),
        GRADIENTS,
        EMBEDDING,
    ),
)

# The rung computes in float32 whatever the model's dtype.
STEPS = (
    _unlisted(
        "schedule moves every second step",
        optimized(Rules(rate=s.every_second_step)),
        OPTIMIZER,
        "learning_rate",
        dtypes=FP32,
    ),
    _unlisted("Nesterov momentum", s.stepping_by(s.nesterov), OPTIMIZER, EMBEDDING, dtypes=FP32),
    _unlisted("second moment never falls", s.stepping_by(s.monotone), OPTIMIZER, EMBEDDING, dtypes=FP32),
    _unlisted("one second moment a tensor", s.stepping_by(s.one_moment_a_tensor), OPTIMIZER, EMBEDDING, dtypes=FP32),
    _unlisted(
        "correction counts micro-batches",
        s.stepping_by(s.correction_of_micro_batches),
        OPTIMIZER,
        EMBEDDING,
        dtypes=FP32,
    ),
    _unlisted(
        "clipped gradients left out", optimized(Rules(clip=s.clipped_to_nothing)), OPTIMIZER, EMBEDDING, dtypes=FP32
    ),
)

# Text has no dtype.
SPEECH = (
    _unlisted("texts cut off", spoken(x.cut_off), IDS, "text.encode", dtypes=FP32, needs=TEXT),
    _unlisted("spaces cleaned up", spoken(x.spaces_cleaned_up), IDS, "text.decode", dtypes=FP32, needs=TEXT),
)

SECOND: tuple[Fault, ...] = (
    *(*PARAMETERS, *OPERATORS, *ATTENTION, *WIRING),
    *(*DECODING, *LEARNING, *STEPS, *SPEECH),
)
"""Written by another person than `FIRST`, who had seen neither repairs nor results."""

HELD_OUT: tuple[Fault, ...] = (*FIRST, *SECOND)
