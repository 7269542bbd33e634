"""Repairs of single ops, measured on the reference's own inputs."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import operators
from oracle.rungs.operators import OpSite
from oracle.site import Site


def half_split(site: Site) -> Iterator[Variant]:
    """Give an op that turns the pairs (2i, 2i + 1) the pairs (i, i + H/2) in that order, and put its answer back."""
    assert isinstance(site, OpSite)
    if site.op.function != "rope":
        return
    rotate = site.candidate.function(site.op)

    def repaired(config: ModelConfig, p: Leaves, x: Any, angles: Any) -> Any:
        first, second = jnp.split(x, 2, axis=-1)
        turned = rotate(config, p, jnp.stack([first, second], axis=-1).reshape(x.shape), angles)
        return jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1)

    yield Variant("with half-split pairs", site.replaced(repaired))


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "RoPE pairs interleaved instead of half-split",
        "rotate the pairs (i, i + H/2) in the rope op (jaxgpt/ops.py), or permute q and k where they are imported",
        (operators.NAME,),
        half_split,
    ),
)
"""Narrow ones first."""
