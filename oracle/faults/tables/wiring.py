"""Rows: wrong wiring, which must show in the rung forward, and wrong decoding, which must in the rung decode."""

from jaxgpt.config import ModelConfig
from oracle.faults import attention as a
from oracle.faults import decoding as d
from oracle.faults import wiring as w
from oracle.faults.fault import Fault, at, first_mlp_tap, has_rope, instead, is_learned, misread, position_tap

OPERATORS, FORWARD, DECODE = "operators", "forward", "decode"
KEYS0 = "layers.0.attn.keys"
MINIMUM = d.FIRST_BUCKET + 2


def _layer_fewer(config: ModelConfig) -> int:
    return config.num_hidden_layers - 1


def _outgrows_bucket(config: ModelConfig) -> bool:
    """The context is longer than the smallest bucket of the cache."""
    return config.max_position_embeddings >= MINIMUM


WIRING = (
    Fault(
        "post-norm for pre-norm",
        "norms come after the residuals",
        w.rewired(w.post_norm),
        FORWARD,
        at("layers.0.attn_norm"),
    ),
    Fault(
        "parallel branches",
        "the MLP reads the stream before attention",
        w.rewired(w.parallel_branches),
        FORWARD,
        at("layers.0.mlp_norm"),
    ),
    Fault(
        "residual of the normed stream",
        "attention is added to the normed stream",
        w.rewired(w.residual_of_norm),
        FORWARD,
        at("layers.0.attn_residual"),
    ),
    Fault(
        "norm skipped",
        "the MLP reads the stream without its norm",
        w.rewired(w.mlp_not_normed),
        FORWARD,
        first_mlp_tap,
    ),
    Fault(
        "norm skipped",
        "values are projected from the stream without its norm",
        w.rewired(w.value_not_normed),
        FORWARD,
        at("layers.0.attn.v"),
        place="value",
    ),
    Fault(
        "one norm for both branches",
        "both norms of a block use the same parameters",
        w.rewired(w.one_norm_for_both),
        FORWARD,
        at("layers.0.mlp_norm"),
    ),
    Fault(
        "normed twice",
        "the MLP's norm reads attention's norm",
        w.rewired(w.normed_twice),
        FORWARD,
        at("layers.0.mlp_norm"),
    ),
    Fault("layer skipped", "the last layer is skipped", w.rewired(w.last_layer_skipped), FORWARD, at("final_norm")),
    Fault(
        "layer skipped",
        "the config says one layer too few",
        lambda c: misread(num_hidden_layers=_layer_fewer(c.config))(c),
        OPERATORS,
        lambda config: f"layers.{_layer_fewer(config)}.attn_norm",
        place="config",
    ),
    Fault(
        "layers run in reverse",
        "the layers run in another order",
        w.rewired(w.layers_reversed),
        FORWARD,
        at("layers.0.attn_norm"),
    ),
    Fault(
        "layers share parameters",
        "all layers use the parameters of layer 0",
        w.rewired(w.layers_shared),
        FORWARD,
        at("layers.1.attn_norm"),
    ),
    Fault(
        "keys of another layer",
        "layers attend to the keys of layer 0",
        w.rewired(w.keys_of_first_layer),
        FORWARD,
        at("layers.1.attn.scores"),
    ),
    Fault(
        "final norm missing",
        "the final norm is missing",
        w.rewired(w.final_norm_skipped),
        FORWARD,
        at("logits"),
        place="wiring",
    ),
    Fault(
        "positions not added",
        "position embeddings are not added",
        w.rewired(w.positions_not_added),
        FORWARD,
        at("layers.0.attn_norm"),
        is_learned,
    ),
    Fault(
        "RoPE not used",
        "queries are not rotated",
        w.rewired(w.query_not_rotated),
        FORWARD,
        at("layers.0.attn.scores"),
        has_rope,
        place="queries",
    ),
    Fault(
        "RoPE not used",
        "neither queries nor keys are rotated",
        w.rewired(w.nothing_rotated),
        FORWARD,
        at("layers.0.attn.scores"),
        has_rope,
    ),
)

DECODING = (
    Fault("cache offset", "the cache's position is off by one", d.stepping(d.offset_by_one), DECODE, position_tap),
    Fault(
        "cache position not advanced",
        "the cache's length is not advanced",
        d.kept(d.not_advanced),
        DECODE,
        position_tap,
    ),
    Fault(
        "positions restart in every step",
        "positions begin at 0 in every step",
        d.fed(d.restarting),
        DECODE,
        position_tap,
    ),
    Fault(
        "step takes the position before",
        "a step's position is one too small",
        d.fed(d.one_behind),
        DECODE,
        position_tap,
    ),
    Fault("left-pad positions", "positions count the padding on the left", d.fed(d.left_padded), DECODE, position_tap),
    Fault(
        "one position for the whole batch",
        "every row takes the position of the longest",
        d.fed(d.of_longest_row),
        DECODE,
        position_tap,
    ),
    Fault("padding counted", "padding is counted as tokens", d.kept(d.padding_counted), DECODE, position_tap),
    Fault(
        "batch pad mask ignored",
        "rows attend to the padding of the batch",
        d.with_op("attention_mask", d.sees_padding),
        DECODE,
        at("mask"),
    ),
    Fault(
        "prefill not causal",
        "a prompt's tokens see the whole prompt",
        d.with_op("attention_mask", d.prefill_not_causal),
        DECODE,
        at("mask"),
    ),
    Fault(
        "step blind to itself",
        "a step does not see its own token",
        d.with_op("attention_mask", d.step_blind_to_itself),
        DECODE,
        at("mask"),
    ),
    Fault(
        "stale cache slot",
        "a step overwrites the slot before",
        d.overwrites_last,
        DECODE,
        at(KEYS0),
        place="overwritten",
    ),
    Fault(
        "stale cache slot",
        "steps do not store their keys",
        instead({"layers.1.attn.keys": d.never_written}),
        OPERATORS,
        at("layers.1.attn.keys"),
        place="not written",
    ),
    Fault("ring buffer", "slots are counted modulo a window", d.ring_too_small, DECODE, at(KEYS0)),
    Fault(
        "cache growth loses a slot",
        "growing the cache loses its last slot",
        d.stepping(d.forgets_last_slot),
        DECODE,
        at(KEYS0),
        _outgrows_bucket,
    ),
    Fault("cache dtype too low", "the cache is in a narrower dtype", d.too_narrow, OPERATORS, at(KEYS0)),
    Fault(
        "values replaced by keys",
        "the values' buffer holds keys",
        w.rewired_step(d.keys_as_values),
        DECODE,
        at("layers.0.attn.values"),
    ),
    Fault(
        "keys stored before RoPE",
        "keys are stored before they are rotated",
        w.rewired_step(d.keys_before_rotation),
        DECODE,
        at(KEYS0),
        has_rope,
    ),
    Fault("cache rows mixed", "the rows of the cache are mixed up", d.kept(d.rows_mixed), DECODE, at(KEYS0)),
    Fault(
        "decoding without attention scale",
        "scores of cached steps are not divided by sqrt(H)",
        d.with_op("scores", a.unscaled_scores),
        DECODE,
        at("layers.0.attn.scores"),
    ),
    Fault(
        "decoding with another theta",
        "cached steps have another RoPE theta",
        d.with_op("angles", a.angles_of_another_theta),
        DECODE,
        at("rope.angles"),
        has_rope,
    ),
)
