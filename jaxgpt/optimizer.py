"""AdamW with clipping, warm-up and a schedule; norms and biases do not decay."""

import math
from functools import cache
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxgpt import model
from jaxgpt.settings import TrainSettings


def schedule(settings: TrainSettings) -> optax.Schedule:
    """Learning rate of each step, counted from 0: the last step has the final rate.

    Linear warm-up, then cosine (Loshchilov & Hutter 2017), warmup-stable-decay
    (Hu et al. 2024), or constant.
    """
    peak, final = settings.learning_rate, settings.learning_rate * settings.final_learning_rate
    last = max(settings.steps - 1, 1)
    warmup = min(settings.warmup_steps, last)
    decay = max(last - warmup, 1)
    if settings.schedule == "wsd":
        decay = min(decay, max(1, round(settings.decay_fraction * settings.steps)))

    def rate(step: Any) -> Array:
        ramp = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        if settings.schedule == "constant":
            return peak * ramp
        done = jnp.clip((step - (last - decay)) / decay, 0.0, 1.0)
        kept = (1 + jnp.cos(math.pi * done)) / 2 if settings.schedule == "cosine" else 1 - done
        return ramp * (final + (peak - final) * kept)

    return rate


def decayed(params: model.Params) -> dict[str, bool]:
    """Which parameters decay: matrices do, norms and biases do not."""
    return {name: array.ndim > 1 for name, array in params.items()}


@cache
def optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019), as optax does them."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule(settings),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )
