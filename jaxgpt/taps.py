"""Tap names of a config, in execution order: the model's wiring as a table.

A model is the list of its ops. Each op is one pure function (by name, in
`jaxgpt.ops.FUNCTIONS`), reads named values and writes one tap, so the same
table runs the model, tells the oracle what to compare and in which order, and
lets it run, feed or replace any single op.

Shapes (B batch, T time, S source time, D model, N query heads, K kv heads,
H head dim, F feed-forward, V vocabulary):

| tap                                   | shape        | tap                  | shape     |
| ------------------------------------- | ------------ | -------------------- | --------- |
| embed.tokens, embed.positions, embed.sum | B T D        | layers.i.attn.out    | B T D     |
| rope.angles                           | B T H/2      | layers.i.attn_residual | B T D   |
| mask (boolean, true = may attend)     | B 1 T S      | layers.i.mlp_norm    | B T D     |
| layers.i.attn_norm                    | B T D        | layers.i.mlp.gate, up, act | B T F |
| layers.i.attn.q / k / v               | B T N·H, K·H | layers.i.mlp.down    | B T D     |
| layers.i.attn.q_heads / k_heads / v_heads | B N T H, B K T H | layers.i.mlp_residual | B T D |
| layers.i.attn.q_norm / k_norm         | as heads     | final_norm           | B T D     |
| layers.i.attn.q_rope / k_rope         | as heads     | logits               | B T V     |
| layers.i.attn.keys / values (cached)  | B K S H      | layers.i.attn.merged | B T N·H   |
| layers.i.attn.scores, masked, weights | B N T S      | layers.i.attn.context | B N T H  |
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxgpt.config import ModelConfig

INPUTS = ("ids", "positions", "slots", "key_slots", "segments", "key_segments")
"""Values every forward starts from: see `jaxgpt.model.run`. A cached one adds
`cache.i.keys` and `cache.i.values`, one with dropout `rng`."""

INTERNAL_TO_FUSED_ATTENTION = ("attn.scores", "attn.masked", "attn.weights")
"""Taps that do not exist when one kernel computes attention: only its boundary,
`q_rope`/`keys`/`values`/`mask` in and `context` out, can be compared then."""


@dataclass(frozen=True)
class Op:
    """One step of the model: `tap = FUNCTIONS[function](parameters, *inputs)`."""

    tap: str
    """Name of the output, e.g. `layers.0.attn.q_rope`."""
    function: str
    """Key of the pure function in `jaxgpt.ops.FUNCTIONS`."""
    inputs: tuple[str, ...]
    """Names of earlier taps, or of model inputs, in argument order."""
    parameters: str = ""
    """The module whose parameters it reads, e.g. `layers.0.attn.q`; empty for none."""


@dataclass(frozen=True)
class Wiring:
    """Which variant of the graph: everything here is static under `jit`."""

    cached: bool = False
    """Keys and values go through a cache (`keys`, `values` taps)."""
    dropout: bool = False
    """Dropout ops are present (training)."""
    fused_attention: bool = False
    """One kernel from q, k, v to context."""


def ops(config: ModelConfig, wiring: Wiring = Wiring()) -> tuple[Op, ...]:
    """All ops of the model, in execution order."""
    layers = [op for i in range(config.num_hidden_layers) for op in layer_ops(config, i, wiring)]
    return (*embedding_ops(config, wiring), *layers, *head_ops(config))


def names(config: ModelConfig, wiring: Wiring = Wiring()) -> tuple[str, ...]:
    """The tap names of `ops`, in execution order."""
    return tuple(op.tap for op in ops(config, wiring))


def embedding_ops(config: ModelConfig, wiring: Wiring) -> Iterator[Op]:
    """Ids to the first residual stream, and what every layer shares: angles and mask."""
    yield Op("embed.tokens", "embed", ("ids",), "embed.tokens")
    if config.position_embedding == "learned":
        yield Op("embed.positions", "embed", ("positions",), "embed.positions")
        yield Op("embed.sum", "add", ("embed.tokens", "embed.positions"))
    else:
        yield Op("rope.angles", "angles", ("positions",))
    if wiring.dropout:
        yield Op("embed.dropped", "embedding_dropout", (_embedded(config), "rng"))
    yield Op("mask", "attention_mask", ("slots", "key_slots", "segments", "key_segments"))


def _embedded(config: ModelConfig) -> str:
    return "embed.sum" if config.position_embedding == "learned" else "embed.tokens"


def layer_input(config: ModelConfig, layer: int, wiring: Wiring) -> str:
    """The tap that is the residual stream entering `layer`."""
    if layer:
        return f"layers.{layer - 1}.mlp_residual"
    return "embed.dropped" if wiring.dropout else _embedded(config)


def layer_ops(config: ModelConfig, layer: int, wiring: Wiring) -> Iterator[Op]:
    """One block: attention and MLP, each behind a norm and added to the stream."""
    stream = layer_input(config, layer, wiring)
    yield from attention_ops(config, layer, wiring, stream)
    yield from mlp_ops(config, layer, wiring)


def attention_ops(config: ModelConfig, layer: int, wiring: Wiring, stream: str) -> Iterator[Op]:
    """Norm, q/k/v, their norms, rotation, cache, attention, output projection, residual."""
    at = f"layers.{layer}"
    attn = f"{at}.attn"
    yield Op(f"{at}.attn_norm", "norm", (stream,), f"{at}.attn_norm")
    for name, split in (("q", "split_query_heads"), ("k", "split_kv_heads"), ("v", "split_kv_heads")):
        yield Op(f"{attn}.{name}", "projection", (f"{at}.attn_norm",), f"{attn}.{name}")
        yield Op(f"{attn}.{name}_heads", split, (f"{attn}.{name}",))
    q, k, v = f"{attn}.q_heads", f"{attn}.k_heads", f"{attn}.v_heads"
    if config.qk_norm:
        yield Op(f"{attn}.q_norm", "norm", (q,), f"{attn}.q_norm")
        yield Op(f"{attn}.k_norm", "norm", (k,), f"{attn}.k_norm")
        q, k = f"{attn}.q_norm", f"{attn}.k_norm"
    if config.position_embedding == "rope":
        yield Op(f"{attn}.q_rope", "rope", (q, "rope.angles"))
        yield Op(f"{attn}.k_rope", "rope", (k, "rope.angles"))
        q, k = f"{attn}.q_rope", f"{attn}.k_rope"
    if wiring.cached:
        yield Op(f"{attn}.keys", "store", (k, f"cache.{layer}.keys", "slots"))
        yield Op(f"{attn}.values", "store", (v, f"cache.{layer}.values", "slots"))
        k, v = f"{attn}.keys", f"{attn}.values"
    if wiring.fused_attention:
        yield Op(f"{attn}.context", "fused_attention", (q, k, v, "mask"))
    else:
        yield Op(f"{attn}.scores", "scores", (q, k))
        yield Op(f"{attn}.masked", "mask", (f"{attn}.scores", "mask"))
        yield Op(f"{attn}.weights", "softmax", (f"{attn}.masked",))
        weights = f"{attn}.weights"
        if wiring.dropout:
            weights = f"{attn}.weights_dropped"
            yield Op(weights, "attention_dropout", (f"{attn}.weights", "rng"))
        yield Op(f"{attn}.context", "context", (weights, v))
    yield Op(f"{attn}.merged", "merge_heads", (f"{attn}.context",))
    yield Op(f"{attn}.out", "projection", (f"{attn}.merged",), f"{attn}.out")
    yield from residual_ops(f"{at}.attn_residual", stream, f"{attn}.out", wiring)


def mlp_ops(config: ModelConfig, layer: int, wiring: Wiring) -> Iterator[Op]:
    """Norm, feed-forward (gated or not), residual."""
    at = f"layers.{layer}"
    mlp = f"{at}.mlp"
    stream = f"{at}.attn_residual"
    yield Op(f"{at}.mlp_norm", "norm", (stream,), f"{at}.mlp_norm")
    if config.gated_mlp:
        yield Op(f"{mlp}.gate", "projection", (f"{at}.mlp_norm",), f"{mlp}.gate")
        yield Op(f"{mlp}.up", "projection", (f"{at}.mlp_norm",), f"{mlp}.up")
        yield Op(f"{mlp}.act", "gated_activation", (f"{mlp}.gate", f"{mlp}.up"))
    else:
        yield Op(f"{mlp}.up", "projection", (f"{at}.mlp_norm",), f"{mlp}.up")
        yield Op(f"{mlp}.act", "activation", (f"{mlp}.up",))
    yield Op(f"{mlp}.down", "projection", (f"{mlp}.act",), f"{mlp}.down")
    yield from residual_ops(f"{at}.mlp_residual", stream, f"{mlp}.down", wiring)


def residual_ops(tap: str, stream: str, branch: str, wiring: Wiring) -> Iterator[Op]:
    """`stream + dropout(branch)`."""
    if wiring.dropout:
        yield Op(f"{branch}_dropped", "residual_dropout", (branch, "rng"))
        branch = f"{branch}_dropped"
    yield Op(tap, "add", (stream, branch))


def head_ops(config: ModelConfig) -> Iterator[Op]:
    """Final norm and vocabulary projection."""
    last = f"layers.{config.num_hidden_layers - 1}.mlp_residual"
    yield Op("final_norm", "norm", (last,), "final_norm")
    yield Op("logits", "head", ("final_norm",), "embed.tokens" if config.tie_word_embeddings else "head")
