"""One tap of the candidate against truth and peer: shape, mask pattern, size of the difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxgpt.taps import Op
from oracle import noise
from oracle.noise import Calibration, Ratios
from oracle.results import Finding

HIDDEN = -1e30
"""A masked score is below this: some programs use the dtype's minimum, some −∞."""

QUERY_BY_SOURCE = ("mask", "attn.scores", "attn.masked", "attn.weights")
WIDE = ("angles", "scores", "mask", "softmax", "head")
"""Ops that answer in float32 whatever the compute dtype is."""
HEADS_FIRST = (
    *("attn.q_heads", "attn.k_heads", "attn.v_heads", "attn.q_norm", "attn.k_norm"),
    *("attn.q_rope", "attn.k_rope", "attn.context"),
)
CACHED = ("attn.keys", "attn.values")


def axes(tap: str) -> tuple[int | None, int | None]:
    """Which axis of a tap is time and which is source time; None if it has none."""
    if tap.endswith(QUERY_BY_SOURCE):
        return 2, 3
    if tap.endswith(CACHED):
        return None, 2
    return (2 if tap.endswith(HEADS_FIRST) else 1), None


@dataclass(frozen=True)
class Window:
    """The real tokens of a padded batch: for each row, where they are in time and in source time."""

    times: Sequence[slice]
    sources: Sequence[slice]

    def rows(self, tap: str, array: np.ndarray) -> list[np.ndarray]:
        """Each row of a tap without its padding."""
        return [array[b][self._index(tap, b)] for b in range(len(self.times))]

    def padding_is_hidden(self, mask: np.ndarray) -> bool:
        """No real token may attend outside its own row's tokens."""
        for b, (time, source) in enumerate(zip(self.times, self.sources, strict=True)):
            rows = mask[b, :, time].copy()
            rows[..., source] = False
            if rows.any():
                return False
        return True

    def _index(self, tap: str, b: int) -> tuple[slice, ...]:
        time, source = axes(tap)
        ndim = max(axis for axis in (time, source, 1) if axis is not None)
        index = [slice(None)] * ndim  # without the batch axis
        if time is not None:
            index[time - 1] = self.times[b]
        if source is not None:
            index[source - 1] = self.sources[b]
        return tuple(index)


@dataclass(frozen=True)
class Judge:
    """Turns one tensor's three versions into a finding."""

    rung: str
    dtype: str
    """The candidate's compute dtype; noise differs between them."""
    calibration: Calibration

    def missing(self, op: Op, side: str, where: str = "") -> Finding:
        """A tap that one side lacks."""
        return Finding(op.tap, op.function, ok=False, where=where, problem=f"the {side} has no such tap")

    def finding(
        self,
        op: Op,
        candidate: Sequence[np.ndarray],
        truth: Sequence[np.ndarray],
        peer: Sequence[np.ndarray],
        *,
        allowed: Sequence[np.ndarray] | None = None,
        where: str = "",
        unit: noise.Unit | None = None,
        echoes: Sequence[Sequence[np.ndarray]] = (),
    ) -> Finding:
        """Compare a tap given in rows.

        Args:
            allowed: for masked scores, where each row may attend; compared as a pattern,
                and values only there.
            unit: the noise of the tap's earlier steps, where there were some.
            echoes: the tap's rows in further draws of the noise.
        """
        problem = _pattern_problem(candidate, truth, peer, allowed)
        if problem or truth[0].dtype == np.bool_:
            return Finding(op.tap, op.function, ok=not problem, where=where, problem=problem)
        # Some taps are wider than the compute dtype: scores, weights, logits. None may be narrower.
        wide = "float32" if op.function in WIDE else self.dtype
        epsilon = min(noise.EPSILON[str(candidate[0].dtype)], noise.EPSILON[wide])
        if allowed is not None:
            candidate, truth, peer, *echoes = (_only(rows, allowed) for rows in (candidate, truth, peer, *echoes))
        pieces = list(zip(candidate, truth, peer, *echoes, strict=True))
        measured = noise.ratios(pieces, epsilon, level=allowed is not None, unit=unit)
        return self.of(op.tap, op.function, measured, where)

    def of(self, tap: str, function: str, measured: Ratios, where: str = "") -> Finding:
        """A finding from ratios; both must be within their limits."""
        limits = self.calibration.threshold(self.rung, self.dtype, function)
        ok = measured.aggregate <= limits[0] and measured.worst <= limits[1] and not measured.problem
        return Finding(
            tap, function, ok, measured.error, measured.aggregate, measured.worst, limits, where, measured.problem
        )


def _pattern_problem(
    candidate: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    peer: Sequence[np.ndarray],
    allowed: Sequence[np.ndarray] | None,
) -> str:
    """What must agree exactly: shapes, booleans, and which scores are masked."""
    for ours, true, theirs in zip(candidate, truth, peer, strict=True):
        if not ours.shape == true.shape == theirs.shape:
            return f"shape {list(ours.shape)}, the reference has {list(true.shape)}"
        if true.dtype == np.bool_ and not np.array_equal(ours, true):
            return f"{int((ours != true).sum()):,} of {ours.size:,} entries differ"
    for ours, true, may in zip(candidate, truth, allowed or (), strict=bool(allowed)):
        for side, scores in (("candidate", ours), ("reference", true)):
            wrong = (scores > HIDDEN) != np.broadcast_to(may, scores.shape)
            if wrong.any():
                return f"the {side} masks {int(wrong.sum()):,} scores otherwise than its mask says"
    return ""


def _only(rows: Sequence[np.ndarray], allowed: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.where(may, scores, 0) for scores, may in zip(rows, allowed, strict=True)]
