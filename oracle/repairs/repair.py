"""A repair: the one change to a candidate that would undo one cause of a difference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oracle.candidate import Candidate
from oracle.site import Site


@dataclass(frozen=True)
class Variant:
    """One way of making the change."""

    change: str
    """Completes `the error falls …`, e.g. `with half-split pairs`, `with theta 1000000`."""
    candidate: Candidate
    advice: str = ""
    """Instead of the repair's own, where it depends on the place."""


@dataclass(frozen=True)
class Repair:
    """How to undo one cause.

    It may change an op's config, parameters, inputs or output, but never put the right
    function in place of the candidate's: that would undo anything and prove nothing.
    """

    cause: str
    """The fault in words, e.g. `RoPE pairs interleaved instead of half-split`."""
    advice: str
    """What to change, and in which file."""
    rungs: tuple[str, ...]
    """Where it is tried."""
    variants: Callable[[Site], Iterator[Variant]]
    """Every way of making the change at a site; none where it cannot apply."""
    last_resort: bool = False
    """It puts the file's own values in place, so that only the look of the difference
    tells the cause; tried when nothing else undoes it."""
    is_seen: bool = False
    """What it changes is seen to be wrong, not only supposed: what undoes the same by its effect is no rival."""
