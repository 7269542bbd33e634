"""A further honest implementation: the reference with every op's result moved by about one rounding error.

Where a model is ill-conditioned (attention that is nearly tied, a few channels that
decide everything), one number may carry the whole error of a tensor. Then the peer
alone tells little about the noise: it is lucky in that number often enough that an
honest candidate seems many times worse. Echoes are further draws of the same noise,
and a difference is measured by the largest of them all; that is stochastic
arithmetic as in Parker, "Monte Carlo Arithmetic" (1997).
"""

from collections.abc import Callable

import torch

ECHOES = 2
"""With the peer three draws: the chance that all are t times too small falls as t⁻³."""
UNTOUCHED = ("embed.tokens", "embed.positions", "_heads", "attn.keys", "attn.values", "attn.masked", "attn.merged")
"""Taps that are copies of numbers, in which no rounding happens; some share the memory of others."""
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}

OnTap = Callable[[str, torch.Tensor], None]
"""Told each tap before the ops that read it run; may change it in place."""


def silent(tap: str, value: torch.Tensor) -> None:
    """Changes nothing: the reference as it is."""


def echo(number: int) -> OnTap:
    """The moves of one echo, the same at every call for one number."""
    generator = torch.Generator().manual_seed(number)

    def move(tap: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and not tap.endswith(UNTOUCHED):
            # In the dtype's own precision a move below half an ulp would be lost; rounding makes it a chance of one.
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            share = torch.rand(value.shape, generator=generator, dtype=wide.dtype).mul_(2).sub_(1)
            value.copy_(wide * (1 + EPSILON[value.dtype] * share))

    return move
