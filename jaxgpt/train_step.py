"""One optimizer step: accumulate gradients over micro-batches in one scan, clip, update.

Pure: state goes in and comes out. A step whose loss or gradient is not finite
leaves everything but the step number as it was.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch
from jaxgpt.loss import Arrays, masked_sum
from jaxgpt.mesh import ALONE, Layout
from jaxgpt.optimizer import optimizer, schedule
from jaxgpt.settings import TrainSettings


class TrainState(NamedTuple):
    """Everything a run needs to go on, besides its place in the data."""

    params: dict[str, Array]
    """float32 master weights."""
    moments: Any
    """Optax state."""
    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    rng: UInt[Array, "2"]
    """Raw key of the run; each step and micro-batch folds in its number."""


class StepReport(NamedTuple):
    """What one step says of itself."""

    loss: Float[Array, ""]
    """Nats a trained token, over all micro-batches."""
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    learning_rate: Float[Array, ""]
    applied: Bool[Array, ""]
    """False where the loss or gradient was not finite."""


def initial_state(params: Mapping[str, Any], settings: TrainSettings, layout: Layout = ALONE) -> TrainState:
    """State before the first step, in float32, where the layout has it."""
    master, moments = _at_first(dict(layout.place(params)), layout)
    rng = jax.random.key_data(jax.random.key(settings.seed))
    return layout.spread(TrainState(master, moments, jnp.int32(0), rng))


@partial(jax.jit, static_argnames="layout")
def _at_first(params: Arrays, layout: Layout) -> tuple[dict[str, Array], Any]:
    """Master weights and moments in one program; made one by one they are three for each shape of parameter."""
    # A copy: the first step donates the state's buffers.
    master = layout.at_rest({name: jnp.array(array, jnp.float32) for name, array in params.items()})
    # Not the run's own settings: before the first step nothing depends on them.
    moments = optimizer(TrainSettings()).init(master)
    return master, jax.tree.map(partial(_at_rest, layout), moments, is_leaf=lambda node: isinstance(node, dict))


def _at_rest(layout: Layout, node: Any) -> Any:
    return layout.at_rest(node) if isinstance(node, dict) else node


def stacked(batches: Sequence[Batch]) -> Mapping[str, Any]:
    """Micro-batches as NumPy arrays (A, B, T)."""
    dicts: Any = batches
    return {name: np.stack([batch[name] for batch in dicts]) for name in dicts[0]}


@partial(jax.jit, static_argnames=("config", "settings", "dtype", "forward", "layout"), donate_argnames="state")
def train_step(
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    batches: Arrays,
    forward: model.ForwardPass | None = None,
    layout: Layout = ALONE,
) -> tuple[TrainState, StepReport]:
    """One update from `batches`, arrays (A, B, T): the same as from one batch of A·B rows.

    The state lies as `layout` has it, and the new one too; `forward` is the pass that is trained, its own unless given.
    """
    loss, gradients = mean_gradients(config, settings, dtype, state, batches, forward, layout)
    grad_norm = optax.tree.norm(gradients)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, moments = optimizer(settings).update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = partial(jnp.where, applied)
    new = TrainState(
        params=layout.at_rest(jax.tree.map(keep, params, state.params)),
        moments=jax.tree.map(keep, moments, state.moments),
        step=state.step + 1,
        rng=state.rng,
    )
    return new, StepReport(loss, grad_norm, _learning_rate(settings, state), applied)


def _learning_rate(settings: TrainSettings, state: TrainState) -> Array:
    # The optimizer's own count, which a skipped step does not advance.
    counts = [s.count for s in jax.tree.leaves(state.moments, is_leaf=_is_schedule) if _is_schedule(s)]
    return jnp.asarray(schedule(settings)(counts[0]), jnp.float32)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def mean_gradients(
    config: ModelConfig,
    settings: TrainSettings,
    dtype: str,
    state: TrainState,
    batches: Arrays,
    forward: model.ForwardPass | None = None,
    layout: Layout = ALONE,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean loss a trained token over all micro-batches, and its gradient."""
    count = jnp.maximum(batches["mask"].sum(), 1.0)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    forward = forward or layout.forward

    def micro(total: tuple[Array, dict[str, Array]], item: tuple[Array, Arrays]) -> tuple[Any, None]:
        number, batch = item
        rng = jax.random.fold_in(key, number)

        def loss(params: model.Params) -> Array:
            summed = masked_sum(config, params, batch, dtype=dtype, rng=rng, remat=settings.remat, forward=forward)
            return summed / count

        value, gradients = jax.value_and_grad(loss)(state.params)
        return (total[0] + value, jax.tree.map(jnp.add, total[1], layout.at_rest(gradients))), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    numbers = jnp.arange(batches["ids"].shape[0])
    (loss, gradients), _ = jax.lax.scan(micro, (jnp.float32(0.0), zeros), (numbers, batches))
    return loss, gradients
