"""The one loss: cross entropy in float32 of the targets whose mask is 1."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batch
from jaxgpt.mesh import ALONE, Layout


def token_losses(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log softmax(logits)[target], in nats."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


Arrays = Mapping[str, Array]
"""A `data.batches.Batch` on the device."""


def masked_sum(
    config: ModelConfig,
    params: model.Params,
    batch: Arrays,
    *,
    dtype: Any,
    rng: Key[Array, ""] | None = None,
    remat: bool = False,
    forward: model.ForwardPass = model.forward,
) -> Float[Array, ""]:
    """Sum of the masked token losses of one batch (arrays B T); divide by the mask's sum yourself.

    A mean here would weigh micro-batches of unequal masks alike: the accumulation
    bug of transformers #34191. `forward` is the pass whose logits are taken.
    """
    output = forward(
        config,
        model.cast(params, dtype),
        batch["ids"],
        positions=batch["positions"],
        segments=batch["segments"],
        rng=rng,
        remat=remat,
    )
    # Where, not times: an infinite loss at a masked place must not become NaN.
    losses = jnp.where(batch["mask"] > 0, token_losses(output.logits, batch["targets"]), 0.0)
    return jnp.sum(losses * batch["mask"])


@partial(jax.jit, static_argnames=("config", "dtype", "layout"))
def _batch_sum(config: ModelConfig, params: model.Params, batch: Arrays, dtype: str, layout: Layout) -> Array:
    return masked_sum(config, params, batch, dtype=dtype, forward=layout.forward)


def evaluate(
    config: ModelConfig, params: model.Params, batches: Iterable[Batch], dtype: str, layout: Layout = ALONE
) -> float:
    """Mean loss in nats a trained token over the batches, dropout off; `layout` is that of `params`."""
    total = count = 0.0
    for batch in batches:
        arrays: Any = batch
        total += float(_batch_sum(config, params, layout.rows(arrays), dtype, layout))
        count += float(np.sum(batch["mask"]))
    return total / count if count else float("nan")
