"""Wrong wiring: every op is right, and reads the wrong tap or the wrong parameters.

The table of `jaxgpt.taps` is changed and run; training, decoding and whole sequences
get the same mistake. Ops alone are right, so it must show in the rung forward.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from jaxgpt import model, taps
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.taps import Op, Wiring
from oracle.candidate import Step
from oracle.faults.fault import Plant

Rewire = Callable[[ModelConfig, Op], Op]
"""One op of the right table to that of the wrong one."""


def rewired(change: Rewire) -> Plant:
    """The mistake wherever the model runs as a whole."""
    return lambda candidate: replace(candidate, forward_pass=_forward(change), step=_step(change))


def rewired_step(change: Rewire) -> Plant:
    """The mistake in cached forwards only."""
    return lambda candidate: replace(candidate, step=_step(change))


@cache
def _forward(change: Rewire) -> model.ForwardPass:
    def forward(
        config: ModelConfig,
        params: model.Params,
        ids: Any,
        *,
        positions: Any = None,
        segments: Any = None,
        rng: Any = None,
        replace: Any = model.UNCHANGED,
        feed: Any = model.UNCHANGED,
        **_: Any,
    ) -> model.Output:
        rates = config.embd_pdrop + config.attn_pdrop + config.resid_pdrop
        wiring = Wiring(dropout=rng is not None and rates > 0)
        table = table_of(config, wiring, change)
        values = model.uncached_inputs(ids, positions, segments) | ({"rng": rng} if wiring.dropout else {})
        values = model.run(config, params, table, values, replace=replace, feed=feed)
        return model.Output(values["logits"], {op.tap: values[op.tap] for op in table})

    return forward


@cache
def _step(change: Rewire) -> Step:
    def step(
        config: ModelConfig, params: model.Params, ids: Any, counts: Any, cache: KVCache, **given: Any
    ) -> tuple[model.Output, KVCache]:
        table = table_of(config, Wiring(cached=True), change)
        return run_cached(config, params, table, model.cached_inputs(config, ids, counts, cache), cache, counts, given)

    return step


def run_cached(
    config: ModelConfig,
    params: model.Params,
    table: tuple[Op, ...],
    values: model.Values,
    cache: KVCache,
    counts: Any,
    given: dict[str, Any],
) -> tuple[model.Output, KVCache]:
    """A cached forward of a given table on given inputs, all logits."""
    options = {name: given[name] for name in ("replace", "feed") if name in given}
    values = model.run(config, params, table, values, **options)
    layers = range(config.num_hidden_layers)
    after = KVCache(
        keys=tuple(values[f"layers.{i}.attn.keys"] for i in layers),
        values=tuple(values[f"layers.{i}.attn.values"] for i in layers),
        lengths=cache.lengths + counts,
    )
    return model.Output(values["logits"], {op.tap: values[op.tap] for op in table}), after


def table_of(config: ModelConfig, wiring: Wiring, change: Rewire) -> tuple[Op, ...]:
    """The wrong table, in an order in which every op finds its inputs."""
    waiting = [change(config, op) for op in taps.ops(config, wiring)]
    made = {op.tap for op in waiting}
    ready: list[Op] = []
    while waiting:
        unmet = made - {op.tap for op in ready}
        now = next(op for op in waiting if not unmet.intersection(op.inputs))
        waiting.remove(now)
        ready.append(now)
    return tuple(ready)


def _place(op: Op) -> tuple[int, str]:
    """Layer (-1 outside) and name inside it."""
    parts = op.tap.split(".", 2)
    return (int(parts[1]), parts[2]) if parts[0] == "layers" else (-1, op.tap)


def _stream(config: ModelConfig, layer: int) -> str:
    """The residual stream that enters a layer."""
    return taps.layer_input(config, layer, Wiring())


def _with(op: Op, old: str, new: str) -> Op:
    return replace(op, inputs=tuple(new if name == old else name for name in op.inputs))


# -- The order of a block --------------------------------------------------------------


def post_norm(config: ModelConfig, op: Op) -> Op:
    """Norms behind the residuals (the first transformer) instead of before the branches."""
    layer, name = _place(op)
    if name == "final_norm":
        return replace(op, inputs=(f"layers.{config.num_hidden_layers - 1}.mlp_norm",))
    if layer < 0:
        return op
    at = f"layers.{layer}"
    stream = f"layers.{layer - 1}.mlp_norm" if layer else _stream(config, 0)
    inputs = {
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), (stream,)),
        "attn_residual": (stream, f"{at}.attn.out"),
        "attn_norm": (f"{at}.attn_residual",),
        **dict.fromkeys(("mlp.gate", "mlp.up"), (f"{at}.attn_norm",)),
        "mlp_residual": (f"{at}.attn_norm", f"{at}.mlp.down"),
        "mlp_norm": (f"{at}.mlp_residual",),
    }
    return replace(op, inputs=inputs.get(name, op.inputs))


def parallel_branches(config: ModelConfig, op: Op) -> Op:
    """The MLP reads the stream before attention (GPT-J, GPT-NeoX)."""
    layer, name = _place(op)
    return replace(op, inputs=(_stream(config, layer),)) if name == "mlp_norm" else op


def residual_of_norm(config: ModelConfig, op: Op) -> Op:
    """Attention is added to the normed stream instead of the stream."""
    layer, name = _place(op)
    return _with(op, _stream(config, layer), f"layers.{layer}.attn_norm") if name == "attn_residual" else op


def mlp_not_normed(config: ModelConfig, op: Op) -> Op:
    """The MLP reads the stream itself."""
    layer, name = _place(op)
    return replace(op, inputs=(f"layers.{layer}.attn_residual",)) if name in ("mlp.gate", "mlp.up") else op


def value_not_normed(config: ModelConfig, op: Op) -> Op:
    """Values are projected from the stream itself."""
    layer, name = _place(op)
    return replace(op, inputs=(_stream(config, layer),)) if name == "attn.v" else op


def one_norm_for_both(config: ModelConfig, op: Op) -> Op:
    """The MLP's norm uses the parameters of attention's."""
    layer, name = _place(op)
    return replace(op, parameters=f"layers.{layer}.attn_norm") if name == "mlp_norm" else op


def normed_twice(config: ModelConfig, op: Op) -> Op:
    """The MLP's norm reads attention's norm."""
    layer, name = _place(op)
    return replace(op, inputs=(f"layers.{layer}.attn_norm",)) if name == "mlp_norm" else op


# -- The order of layers ---------------------------------------------------------------


def last_layer_skipped(config: ModelConfig, op: Op) -> Op:
    """One layer too few."""
    before_last = _stream(config, config.num_hidden_layers - 1)
    return replace(op, inputs=(before_last,)) if op.tap == "final_norm" else op


def layers_reversed(config: ModelConfig, op: Op) -> Op:
    """The last layer runs first."""
    layer, _ = _place(op)
    last = config.num_hidden_layers - 1
    if op.tap == "final_norm":
        return replace(op, inputs=("layers.0.mlp_residual",))
    if layer < 0:
        return op
    stream = _stream(config, 0) if layer == last else f"layers.{layer + 1}.mlp_residual"
    return _with(op, _stream(config, layer), stream)


def layers_shared(config: ModelConfig, op: Op) -> Op:
    """Every layer uses the parameters of layer 0 (ALBERT, or a loop variable captured too early)."""
    layer, _ = _place(op)
    return replace(op, parameters=op.parameters.replace(f"layers.{layer}.", "layers.0.")) if layer > 0 else op


def keys_of_first_layer(config: ModelConfig, op: Op) -> Op:
    """Every layer attends to the keys of layer 0."""
    layer, name = _place(op)
    if layer < 1 or name != "attn.scores":
        return op
    return replace(op, inputs=(op.inputs[0], op.inputs[1].replace(f"layers.{layer}.", "layers.0.")))


# -- Around the layers -----------------------------------------------------------------


def final_norm_skipped(config: ModelConfig, op: Op) -> Op:
    """The head reads the stream itself."""
    last = f"layers.{config.num_hidden_layers - 1}.mlp_residual"
    return replace(op, inputs=(last,)) if op.tap == "logits" else op


def positions_not_added(config: ModelConfig, op: Op) -> Op:
    """The layers read the token embedding alone."""
    return _with(op, "embed.sum", "embed.tokens")


def query_not_rotated(config: ModelConfig, op: Op) -> Op:
    """Scores are of the queries before RoPE."""
    layer, name = _place(op)
    at = f"layers.{layer}.attn"
    return _with(op, f"{at}.q_rope", f"{at}.q_heads") if name == "attn.scores" else op


def nothing_rotated(config: ModelConfig, op: Op) -> Op:
    """RoPE is computed and not used."""
    layer, name = _place(op)
    at = f"layers.{layer}.attn"
    if name == "attn.keys":
        return _with(op, f"{at}.k_rope", f"{at}.k_heads")
    op = _with(op, f"{at}.k_rope", f"{at}.k_heads") if name == "attn.scores" else op
    return _with(op, f"{at}.q_rope", f"{at}.q_heads") if name == "attn.scores" else op


def untouched(config: ModelConfig, op: Op) -> Op:
    """The right table, for mistakes elsewhere in a cached forward."""
    return op
