"""Wrong batches, losses and gradients that nobody repairs."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import loss, model
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch
from jaxgpt.ops import FUNCTIONS, Leaves, OpFunction
from jaxgpt.optimizer import optimizer, schedule
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import training
from oracle.faults.fault import Plant
from oracle.faults.training import Gradients, trained
from oracle.training_probe import Corpus

Array = Any
SHARD = 8
"""Places of a row that one device of a sequence-parallel group holds."""
CAP = 5.0
"""Nats."""

# -- Batches and loss ------------------------------------------------------------------


def _targets_of_the_batch_before(corpus: Corpus, settings: TrainSettings) -> Sequence[Batch]:
    right: Any = training.batches(corpus, settings)
    before = [right[0], *right[:-1]]
    wrong: Any = [{**batch, "targets": stale["targets"]} for batch, stale in zip(right, before, strict=True)]
    return wrong


stale_targets = trained(batches=_targets_of_the_batch_before)
"""The buffer of the targets is filled one batch late."""


def shifted_inside_shards(batch: Batch) -> dict[str, np.ndarray]:
    """Each device shifts the labels of its own places: the last place of a shard gets the shard's first label."""
    targets = batch["targets"]
    labels, ids = (array.reshape(len(targets), -1, SHARD) for array in (targets, batch["ids"]))
    return {"targets": np.concatenate([labels[..., :-1], ids[..., :1]], axis=-1).reshape(targets.shape)}


def capped(logits: Array, targets: Array) -> Array:
    """Losses beyond five nats count as five: outliers are not to spoil a step."""
    return jnp.minimum(loss.token_losses(logits, targets), CAP)


def tokens_of_first(batch: Any, batches: Any) -> Array:
    """The trained tokens are counted in the first micro-batch and taken for those of all."""
    return jnp.maximum(batches["mask"][0].sum(), 1) * batches["ids"].shape[0]


# -- Backward --------------------------------------------------------------------------

Replacements = tuple[tuple[str, OpFunction], ...]
"""Ops that are right forward and wrong backward, by tap or function."""


def backward(*replacements: tuple[str, OpFunction]) -> Plant:
    """Losses stay right; gradients and steps go through the wrong backward of some ops."""
    return trained(gradients=_gradients(replacements), step=_step(replacements))


@cache
def _gradients(replacements: Replacements) -> training.Gradients:
    return jax.jit(partial(_mean_gradients, replacements), static_argnums=(0, 1, 2))


def _mean_gradients(
    replacements: Replacements,
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    batches: Any,
) -> tuple[Array, Gradients]:
    count = jnp.maximum(batches["mask"].sum(), 1.0)

    def micro(params: model.Params, batch: Any) -> Array:
        given: dict[str, Any] = {name: batch[name] for name in ("positions", "segments")}
        cast = model.cast(params, dtype)
        output = model.forward(config, cast, batch["ids"], replace=dict(replacements), **given)
        each = loss.token_losses(output.logits, batch["targets"])
        return jnp.where(batch["mask"] > 0, each, 0.0).sum() / count

    def add(so_far: tuple[Array, Gradients], batch: Any) -> tuple[tuple[Array, Gradients], None]:
        value, found = jax.value_and_grad(micro)(state.params, batch)
        return (so_far[0] + value, jax.tree.map(jnp.add, so_far[1], found)), None

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
    (mean, total), _ = jax.lax.scan(add, start, batches)
    return mean, total


@cache
def _step(replacements: Replacements) -> training.Step:
    @partial(jax.jit, static_argnums=(0, 1, 2))
    def step(
        config: ModelConfig, settings: TrainSettings, dtype: str, state: TrainState, batches: Any
    ) -> tuple[TrainState, StepReport]:
        mean, found = _mean_gradients(replacements, config, settings, dtype, state, batches)
        updates, moments = optimizer(settings).update(found, state.moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        rate = jnp.asarray(schedule(settings)(state.step), jnp.float32)
        report = StepReport(mean, optax.tree.norm(found), rate, jnp.bool_(True))
        return TrainState(params, moments, state.step + 1, state.rng), report

    return step


def scale_detached(config: ModelConfig, p: Leaves, x: Array) -> Array:
    """The norm's scale is a constant to the gradient."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True) if config.norm == "layernorm" else y
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.rms_norm_eps)
    y = y * jax.lax.stop_gradient(scale) * p["weight"].astype(jnp.float32)
    return (y + p["bias"].astype(jnp.float32) if "bias" in p else y).astype(x.dtype)


def lookup_detached(config: ModelConfig, p: Leaves, ids: Array) -> Array:
    """A tied embedding learns as the head and not as the embedding."""
    return FUNCTIONS["embed"](config, {"weight": jax.lax.stop_gradient(p["weight"])}, ids)


@jax.custom_vjp
def _rows(table: Array, ids: Array) -> Array:
    return table[ids]


def _rows_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[ids], (table, ids)


def _rows_backward(kept: tuple[Array, Array], found: Array) -> tuple[Array, None]:
    table, ids = kept
    places = jnp.arange(ids.size)
    last = jnp.full(table.shape[0], -1).at[ids.reshape(-1)].max(places)
    rows = found.reshape(-1, table.shape[1])[last]
    return jnp.where(last[:, None] < 0, 0, rows).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def last_write_kept(config: ModelConfig, p: Leaves, ids: Array) -> Array:
    """An embedding's gradient is scattered with set: of a token's occurrences the last one counts."""
    return _rows(p["weight"], ids)


def rectified_backward(config: ModelConfig, p: Leaves, x: Array, *up: Array) -> Array:
    """The activation is right and its gradient is that of ReLU."""
    rectified = jax.nn.relu(x)
    # What is added is zero, and has a gradient.
    y = jax.lax.stop_gradient(FUNCTIONS["activation"](config, p, x)) + (rectified - jax.lax.stop_gradient(rectified))
    return y * up[0] if up else y
