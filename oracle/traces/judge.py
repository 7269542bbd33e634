"""How large a difference between two recordings may be, where nothing but the recordings is known.

There are three answers, and every comparison says which it used:

- **a truth** (a float64 recording of A): B's distance from it is measured in multiples
  of A's own, as everywhere in the oracle. The sharpest.
- **a repetition** (another recording of A, on another machine or compiled otherwise):
  B's distance from A in multiples of the repetition's, but no sharper than the third.
- **the dtype**: B's distance from A in units in the last place at the tensor's scale.

The dtype that counts is the coarsest that either run has held so far: a float32 tap
behind bfloat16 ones carries their noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxgpt.errors import InputError
from oracle import noise
from oracle.compare import HIDDEN
from oracle.noise import Ratios
from oracle.results import Finding
from oracle.traces.trace import EXACT_KINDS, Trace, epsilon

Limits = tuple[float, float]
"""Of the whole tensor, and of the worst position."""

MEASURED: Limits = (8.0, 16.0)
"""In multiples of measured noise. Clean runs of JAX against torch, 14 tiny models of up
to 12 layers in float32 and bfloat16, reached 1.2 and 1.9 against a float64 truth."""
UNITS: Mapping[bool, Limits] = {True: (8.0, 16.0), False: (32.0, 64.0)}
"""In units in the last place, for dtypes of fewer than 24 bits of precision and for the
others, whose sums are rounded as often as they are long. The same clean runs reached
2.9 and 4.7 in bfloat16, 12 and 16 in float32."""


@dataclass(frozen=True)
class Judge:
    """Compares a tap of B with A's."""

    truth: Trace | None = None
    repetition: Trace | None = None

    @property
    def unit(self) -> str:
        """What its numbers are multiples of."""
        return "units in the last place" if self.truth is None and self.repetition is None else "times the noise"

    def describe(self, units: Sequence[float]) -> str:
        """What a difference is measured by, for the report; `units` are the epsilons that occur."""
        if self.truth is not None:
            return (
                f"distance from the float64 truth in multiples of A's own (limits {MEASURED[0]:g} over the tensor, "
                f"{MEASURED[1]:g} at the worst position)"
            )
        limits = "; ".join(
            f"{'narrow dtypes' if narrow else 'float32'}: limits {UNITS[narrow][0]:g} over the tensor, "
            f"{UNITS[narrow][1]:g} at the worst position"
            for narrow in sorted({_is_narrow(unit) for unit in units})
        )
        if self.repetition is not None:
            return (
                f"distance from A in multiples of the repetition's (limits {MEASURED[0]:g} and {MEASURED[1]:g}), "
                f"at least units in the last place ({limits})"
            )
        return f"units in the last place at the tensor's scale, assumed, not measured ({limits})"

    def finding(self, name: str, a: np.ndarray, b: np.ndarray, coarsest: float, where: str) -> Finding:
        """One tap. `coarsest` is the epsilon of the coarsest dtype either run has held so far."""
        problem = _problem(a, b)
        if problem or not a.size or a.dtype.kind in EXACT_KINDS:
            return Finding(name, "", ok=not problem, where=where, problem=problem)
        if self.truth is None:
            return self._against_a(name, a, b, coarsest, where)
        truth = self.truth.taps.get(name)
        problem = _other_problem(truth, a, "the truth")
        if truth is None or problem:
            return Finding(name, "", ok=False, where=where, problem=problem)
        own = max(epsilon(a.dtype), epsilon(b.dtype))
        return _finding(name, _ratios(b, truth, a, own), MEASURED, where)

    def _against_a(self, name: str, a: np.ndarray, b: np.ndarray, coarsest: float, where: str) -> Finding:
        found = _finding(name, _ratios(b, a, a, coarsest), UNITS[_is_narrow(coarsest)], where)
        if found.ok or self.repetition is None:
            return found
        other = self.repetition.taps.get(name)
        problem = _other_problem(other, a, "the repetition")
        if other is None or problem:
            return Finding(name, "", ok=False, where=where, problem=problem)
        return _finding(name, _ratios(b, a, other, coarsest), MEASURED, where)


def check_truth(truth: Trace, a: Trace) -> None:
    """A truth must know better than what it judges.

    Raises:
        InputError: its taps are no finer than A's.
    """
    for name, tap in a.taps.items():
        other = truth.taps.get(name)
        if other is not None and epsilon(tap.dtype) and epsilon(other.dtype) >= epsilon(tap.dtype):
            raise InputError(
                f"--truth holds {name} in {other.dtype}, A in {tap.dtype}: a truth is a recording in float64"
            )


def _is_narrow(unit: float) -> bool:
    return unit > epsilon(np.dtype(np.float32))


def _finding(name: str, measured: Ratios, limits: Limits, where: str) -> Finding:
    ok = measured.aggregate <= limits[0] and measured.worst <= limits[1] and not measured.problem
    ratios = measured.error, measured.aggregate, measured.worst
    return Finding(name, "", ok, *ratios, limits, where, measured.problem)


def _problem(a: np.ndarray, b: np.ndarray) -> str:
    """What must agree exactly: shape, kind, integers, and where values are not finite or masked."""
    if a.shape != b.shape:
        return f"shape {list(b.shape)} in B, {list(a.shape)} in A"
    exact = [side.dtype.kind in EXACT_KINDS for side in (a, b)]
    if exact[0] != exact[1]:
        return f"{b.dtype} in B, {a.dtype} in A"
    if exact[0]:
        differing = int((a != b).sum())
        return f"{differing:,} of {a.size:,} entries differ" if differing else ""
    hidden = [_hidden(side) for side in (a, b)]
    if not np.array_equal(hidden[0], hidden[1]):
        return f"{int((hidden[0] != hidden[1]).sum()):,} of {a.size:,} entries are masked in one of A and B only"
    for side, array, masked in (("A", a, hidden[0]), ("B", b, hidden[1])):
        broken = int((~np.isfinite(array) & ~masked).sum())
        if broken:
            return f"{broken:,} of {array.size:,} entries are NaN or infinite in {side}"
    return ""


def _other_problem(other: np.ndarray | None, a: np.ndarray, whose: str) -> str:
    if other is None:
        return f"{whose} has no such tap, so there is nothing to measure it by"
    if other.shape != a.shape:
        return f"{whose} has shape {list(other.shape)}, A {list(a.shape)}"
    if not np.array_equal(np.isfinite(other) & ~_hidden(other), ~_hidden(a)):
        return f"{whose} masks or overflows where A does not"
    return ""


def _hidden(array: np.ndarray) -> np.ndarray:
    """Masked scores: some programs use −∞, some the dtype's minimum, some a round number."""
    lowest = float(ml_dtypes.finfo(array.dtype).min) / 2
    return array < (max(HIDDEN, lowest) if array.dtype.itemsize > 1 else -np.inf)


def _ratios(candidate: np.ndarray, truth: np.ndarray, peer: np.ndarray, unit: float) -> Ratios:
    versions = candidate, truth, peer
    hidden = _hidden(truth)
    if hidden.any():
        candidate, truth, peer = (np.where(hidden, 0, array) for array in versions)
    # At the tensor's scale: without a model there is no telling which rows are small by cancellation.
    piece = np.atleast_1d(candidate), np.atleast_1d(truth), np.atleast_1d(peer)
    return noise.ratios([piece], unit, level=True)
