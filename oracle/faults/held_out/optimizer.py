"""Wrong steps that nobody repairs: gradients are right, and what is made of them is not."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt import train_step
from jaxgpt.config import ModelConfig
from jaxgpt.optimizer import decayed, schedule
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import StepReport, TrainState
from oracle import training
from oracle.faults.fault import Plant
from oracle.faults.training import Gradients, trained

Array = Any
Adam = Callable[[TrainSettings], optax.GradientTransformation]
"""Settings to the part of AdamW that turns gradients into directions, with optax's own state."""


def stepping_by(adam: Adam) -> Plant:
    """AdamW of which one part is another."""
    return trained(step=_step(adam))


@cache
def _step(adam: Adam) -> training.Step:
    @partial(jax.jit, static_argnums=(0, 1, 2))
    def step(
        config: ModelConfig, settings: TrainSettings, dtype: str, state: TrainState, batches: Any
    ) -> tuple[TrainState, StepReport]:
        mean, found = train_step.mean_gradients(config, settings, dtype, state, batches)
        updates, moments = _adamw(adam, settings).update(found, state.moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        rate = jnp.asarray(schedule(settings)(state.step), jnp.float32)
        report = StepReport(mean, optax.tree.norm(found), rate, jnp.bool_(True))
        return TrainState(params, moments, state.step + 1, state.rng), report

    return step


def _adamw(adam: Adam, settings: TrainSettings) -> optax.GradientTransformation:
    directions = optax.chain(
        adam(settings),
        optax.add_decayed_weights(settings.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule(settings)),
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), directions)


def nesterov(settings: TrainSettings) -> optax.GradientTransformation:
    """Momentum looks one step ahead (NAdam)."""
    return optax.scale_by_adam(settings.beta1, settings.beta2, nesterov=True)


def _adam(directions: Callable[[TrainSettings, Any, Any], tuple[Any, Any]]) -> Adam:
    """Moments as they should be, and directions made of them wrongly."""

    def adam(settings: TrainSettings) -> optax.GradientTransformation:
        right = optax.scale_by_adam(settings.beta1, settings.beta2)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            _, after = right.update(updates, state, params)
            return directions(settings, state, after)

        return optax.GradientTransformation(right.init, update)

    return adam


def _quotient(settings: TrainSettings, moments: Any, count: Array) -> Any:
    first, second = 1 - settings.beta1**count, 1 - settings.beta2**count
    return jax.tree.map(lambda mu, nu: mu / first / (jnp.sqrt(nu / second) + 1e-8), moments.mu, moments.nu)


def _monotone(settings: TrainSettings, before: Any, after: Any) -> tuple[Any, Any]:
    after = after._replace(nu=jax.tree.map(jnp.maximum, before.nu, after.nu))
    return _quotient(settings, after, after.count), after


def _one_a_tensor(settings: TrainSettings, before: Any, after: Any) -> tuple[Any, Any]:
    shared = after._replace(nu=jax.tree.map(lambda nu: jnp.full_like(nu, nu.mean()), after.nu))
    return _quotient(settings, shared, after.count), after


def _of_micro_batches(settings: TrainSettings, before: Any, after: Any) -> tuple[Any, Any]:
    return _quotient(settings, after, settings.accumulate * after.count), after


monotone = _adam(_monotone)
"""The second moment never falls (AMSGrad)."""
one_moment_a_tensor = _adam(_one_a_tensor)
"""All numbers of a tensor are divided by the root of their mean second moment."""
correction_of_micro_batches = _adam(_of_micro_batches)
"""The count that corrects the moments is advanced by every micro-batch."""


def clipped_to_nothing(found: Gradients, limit: float) -> Gradients:
    """A gradient longer than the limit is left out as a spike."""
    kept = optax.tree.norm(found) <= limit
    return {name: jnp.where(kept, array, 0) for name, array in found.items()}


def every_second_step(settings: TrainSettings) -> Callable[[Array], Array]:
    """The schedule moves on after every second step only."""
    return lambda step: schedule(settings)(step - step % 2)
