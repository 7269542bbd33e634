"""Wrong wiring that nobody repairs: every op is right by itself."""

from dataclasses import replace
from typing import Any

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.taps import Op, Wiring, layer_input
from oracle.candidate import Candidate

Array = Any


def _layer(op: Op) -> int:
    """-1 outside the layers."""
    head, _, rest = op.tap.partition(".")
    return int(rest.partition(".")[0]) if head == "layers" else -1


def gate_from_attention(config: ModelConfig, op: Op) -> Op:
    """The last layer's MLP reads the norm of the first's."""
    last = f"layers.{config.num_hidden_layers - 1}"
    if not op.tap.startswith(f"{last}.mlp.") or f"{last}.mlp_norm" not in op.inputs:
        return op
    return replace(op, inputs=("layers.0.mlp_norm",))


def residual_not_renewed(config: ModelConfig, op: Op) -> Op:
    """The MLP is added to what was the stream before attention: `residual` was not assigned again."""
    if not op.tap.endswith(".mlp_residual"):
        return op
    return replace(op, inputs=(layer_input(config, _layer(op), Wiring()), op.inputs[1]))


def last_output_projection(config: ModelConfig, op: Op) -> Op:
    """The variable of the loop over layers is read late: all project by the last layer's matrix."""
    if not op.tap.endswith(".attn.out"):
        return op
    return replace(op, parameters=f"layers.{config.num_hidden_layers - 1}.attn.out")


def keys_of_a_stale_norm(config: ModelConfig, op: Op) -> Op:
    """From layer 1 on keys are projected from what layer 0 normed."""
    return replace(op, inputs=("layers.0.attn_norm",)) if op.tap.endswith(".attn.k") else op


def _positions_ignored(
    config: ModelConfig, params: model.Params, ids: Array, *, positions: Array = None, **given: Any
) -> model.Output:
    return model.forward(config, params, ids, **given)


def positions_ignored(candidate: Candidate) -> Candidate:
    """The positions that a caller gives are not handed on: packed documents do not restart."""
    return replace(candidate, forward_pass=_positions_ignored)
