"""A further honest implementation: the reference with every op's result moved by about one rounding error.

Where a model is ill-conditioned (attention that is nearly tied, a few channels that
decide everything), one number may carry the whole error of a tensor. Then the peer
alone tells little about the noise: it is lucky in that number often enough that an
honest candidate seems many times worse. Echoes are further draws of the same noise,
and a difference is measured by the largest of them all; that is stochastic
arithmetic as in Parker, "Monte Carlo Arithmetic" (1997).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from oracle.results import Finding
from torchref import Decoder

ECHOES = 2
"""With the peer three draws: the chance that all are t times too small falls as t⁻³."""
FURTHER = range(ECHOES, 7)
"""Numbers of the echoes that are drawn where those leave a doubt: together as t⁻⁸."""
ALL = range(FURTHER.stop)
"""Numbers of every echo."""
DOUBTFUL, HOPELESS = 2.0, 300.0
"""Multiples of the noise of the draws so far that an honest implementation may reach by their luck."""
UNTOUCHED = ("embed.tokens", "embed.positions", "_heads", "attn.keys", "attn.values", "attn.masked", "attn.merged")
"""Taps that are copies of numbers, in which no rounding happens; some share the memory of others."""
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}

OnTap = Callable[[str, torch.Tensor], torch.Tensor]
"""From a tap as the reference computes it to what the ops that read it are given."""


def silent(tap: str, value: torch.Tensor) -> torch.Tensor:
    """The reference as it is."""
    return value


def echo(number: int) -> OnTap:
    """The moves of one echo, the same every time for one number."""
    generator = torch.Generator().manual_seed(number)

    def move(tap: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or tap.endswith(UNTOUCHED):
            return value
        # In the dtype's own precision a move below half an ulp would be lost; rounding makes it a chance of one.
        wide = torch.promote_types(value.dtype, torch.float32)
        ulp = EPSILON[value.dtype]
        share = torch.empty(value.shape, dtype=wide).uniform_(-ulp, ulp, generator=generator)
        return share.add_(1).mul_(value).to(value.dtype)

    return move


class Changing(dict[str, torch.Tensor]):
    """The `taps` argument of a forward that goes on with what `on_tap` makes of each."""

    def __init__(self, on_tap: OnTap):
        super().__init__()
        self._on_tap = on_tap

    def __setitem__(self, tap: str, value: torch.Tensor) -> None:
        super().__setitem__(tap, self._on_tap(tap, value))


class Forgetful(Changing):
    """Keeps the latest tap alone."""

    def __setitem__(self, tap: str, value: torch.Tensor) -> None:
        self.clear()
        super().__setitem__(tap, value)


def leave_a_doubt(findings: Iterable[Finding], least: float = DOUBTFUL) -> bool:
    """Whether one of them may be beyond its limits because the draws were all lucky.

    Further draws only make a ratio smaller: what is within its limits stays there. Without
    limits, in the clean runs from which they come, everything above `least` is doubtful.
    """
    return any(least < finding.noise < HOPELESS and not _is_within_limits(finding) for finding in findings)


def _is_within_limits(finding: Finding) -> bool:
    return finding.ok and max(finding.threshold) < float("inf")


def echoes(decoder: Decoder, numbers: Iterable[int] = range(ECHOES)) -> Iterator[Decoder]:
    """The decoder as each echo in turn."""
    for number in numbers:
        with echoing(decoder, number) as moved:
            yield moved


@contextmanager
def echoing(decoder: Decoder, number: int) -> Generator[Decoder]:
    """A decoder, and copies made of it meanwhile, as an echo: every forward is moved, and its gradient with it."""
    move = echo(number)

    def moved(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {"taps": Forgetful(move), **given}

    handle = decoder.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        yield decoder
    finally:
        handle.remove()
