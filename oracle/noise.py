"""How large a difference is, in multiples of measured noise.

Truth is the reference in float64; the peer is the reference in the candidate's
dtype, so its distance from the truth is what rounding costs an honest
implementation. Echoes are further draws of the same noise (`oracle.echo`). The
candidate's distance is divided by the largest of theirs, with a floor of one ulp at
the tensor's scale for tensors that they happen to hit exactly.

Two ratios are formed and neither rescues the other: over the whole tensor, and at
the worst position, where each row (last axis) is measured at its own scale so that
a small row beside large ones is not forgiven. Their limits come from clean runs
(`oracle/calibration.json`, written by `python -m oracle calibrate`).
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from jaxgpt.errors import InputError, first
from oracle.results import Inconclusive

CALIBRATION = Path(__file__).with_name("calibration.json")
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-52}
"""Distance from 1 to the next number."""
CHUNK = 1 << 17
"""Elements handled at once in float64: one MiB, which stays in the processor's cache."""


@dataclass(frozen=True)
class Ratios:
    """One measured difference."""

    error: float
    """‖candidate − truth‖ / ‖truth‖."""
    aggregate: float
    worst: float
    problem: str = ""


@dataclass
class _Sums:
    truth: float = 0.0
    candidate: float = 0.0
    peers: list[float] = field(default_factory=list)
    candidate_worst: float = 0.0
    peer_worst: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Unit:
    """What rounding cost the peer so far, over several tensors of one tap.

    A decode step has a few rows: too few to tell how large their noise is, and a peer
    that happens to be lucky in them would make an honest candidate look wrong. So each
    step is measured by the noise of all steps up to it.
    """

    truth: float = 0.0
    """Sum of squares."""
    peer: float = 0.0
    """Sum of squares of the peer's error."""
    worst: float = 0.0
    """The peer's error at its worst position, relative to its row."""

    def add(self, truth: float, peer: float, worst: float) -> None:
        """One more tensor."""
        self.truth += truth
        self.peer += peer
        self.worst = max(self.worst, worst)

    @property
    def relative(self) -> float:
        """‖peer − truth‖ / ‖truth‖ of all tensors together."""
        return (self.peer / self.truth) ** 0.5 if self.truth else 0.0


Versions = Sequence[np.ndarray]
"""Candidate, truth, peer and any echoes of one piece of a tensor, of equal shape."""


def ratios(pieces: Sequence[Versions], epsilon: float, *, level: bool = False, unit: Unit | None = None) -> Ratios:
    """Compare a tensor given in pieces (for example the rows of a ragged batch).

    `epsilon` is that of the candidate's dtype. A value that is not finite on any
    side is a problem, whatever the others say. `level`: measure every row at the scale
    of the whole tensor at least, where a row may hold a single number (masked scores).
    `unit`: the noise of earlier tensors of the same tap, to which this one's is added.
    """
    peak = max((float(np.abs(truth).max()) for _, truth, *_ in pieces if truth.size), default=0.0)
    sums = _Sums()
    for piece in pieces:
        for chunk in _chunks(piece):
            _accumulate(sums, chunk, smallest=peak * (1.0 if level else epsilon))
    if sums.problems:
        return Ratios(float("inf"), float("inf"), float("inf"), sums.problems[0])
    norm = sums.truth**0.5
    unit = unit or Unit()
    peer = max(sums.peers, default=0.0)
    unit.add(sums.truth, peer, sums.peer_worst)
    return Ratios(
        error=_quotient(sums.candidate**0.5, norm),
        aggregate=_quotient(sums.candidate**0.5, max(peer**0.5, unit.relative * norm, epsilon * norm)),
        worst=_quotient(sums.candidate_worst, max(unit.worst, epsilon)),
    )


def _quotient(value: float, by: float) -> float:
    return value / by if by else (0.0 if value == 0.0 else float("inf"))


def _chunks(piece: Versions) -> Iterator[list[np.ndarray]]:
    width = piece[1].shape[-1]
    flat = [array.reshape(-1, width) for array in piece]
    rows = max(1, CHUNK // max(1, width))
    for start in range(0, len(flat[1]), rows):
        yield [array[start : start + rows] for array in flat]


def _accumulate(sums: _Sums, chunk: Versions, smallest: float) -> None:
    candidate, true, *peers = chunk
    sums.problems += not_finite(candidate, true, peers)
    if sums.problems:
        return
    truth = true.astype(np.float64, copy=False)
    scale = np.maximum(_largest(truth), max(smallest, np.finfo(np.float64).tiny))
    ours, *theirs = (np.subtract(array, truth, dtype=np.float64) for array in (candidate, *peers))
    sums.truth += squares(truth)
    sums.candidate += squares(ours)
    sums.candidate_worst = max(sums.candidate_worst, float((_largest(ours) / scale).max()))
    sums.peers = sums.peers or [0.0] * len(peers)
    for index, error in enumerate(theirs):
        sums.peers[index] += squares(error)
        sums.peer_worst = max(sums.peer_worst, float((_largest(error) / scale).max()))


def not_finite(candidate: np.ndarray, truth: np.ndarray, peers: Sequence[np.ndarray]) -> list[str]:
    """What is to be said of arrays with NaN or infinite values."""
    named = [("candidate", candidate), ("reference in float64", truth), *(("reference", peer) for peer in peers)]
    return [f"the {side} has NaN or infinite values" for side, array in named if not np.isfinite(array).all()]


def squares(array: np.ndarray) -> float:
    """Their sum. A scalar product would be sooner done, but by threads that then wait in the way of torch's."""
    return float(np.square(array).sum())


def _largest(array: np.ndarray) -> np.ndarray:
    """Of the magnitudes in each row."""
    return np.maximum(array.max(axis=-1), -array.min(axis=-1))


def kl_ratios(pieces: Sequence[Versions], epsilon: float) -> tuple[Ratios, float]:
    """Per-token KL(truth ‖ ·) of logits, and its largest value in nats.

    KL grows with the square of the error, so the ratios are of its square root: the
    mean over tokens, and the worst token. The floor is one ulp at the logits' scale.
    """
    candidate, *peers = (
        np.concatenate([_divergences(piece[1], piece[side]) for piece in pieces])
        for side in range(len(pieces[0]))
        if side != 1
    )
    scale = max(float(np.abs(truth).max()) for _, truth, *_ in pieces)
    floor = (epsilon * scale) ** 2
    largest = float(candidate.max())
    if not np.isfinite(candidate).all():
        return Ratios(float("inf"), float("inf"), float("inf"), "KL is not finite"), largest
    aggregate = float(candidate.mean()) / max(floor, *(float(peer.mean()) for peer in peers))
    worst = largest / max(floor, *(float(peer.max()) for peer in peers))
    return Ratios(largest, aggregate**0.5, worst**0.5), largest


def _divergences(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    width = truth.shape[-1]
    truth, logits = truth.reshape(-1, width), logits.reshape(-1, width)
    rows = max(1, CHUNK // width)
    parts = [_kl(truth[i : i + rows], logits[i : i + rows]) for i in range(0, len(truth), rows)]
    return np.concatenate(parts)


def _kl(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    p, q = _log_softmax(truth), _log_softmax(logits)
    # KL is not negative; rounding of equal distributions may make it so.
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


# -- Limits ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Largest ratios that clean runs reached, and the factor that makes limits of them."""

    factor: float
    maxima: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    """maxima[rung][dtype][op] = [aggregate, worst]."""
    environment: Mapping[str, Any]

    def threshold(self, rung: str, dtype: str, op: str) -> tuple[float, float]:
        """Limits of the aggregate and the worst ratio. An op that was always exact must stay exact.

        Raises:
            Inconclusive: nothing of this kind was measured.
        """
        try:
            aggregate, worst = self.maxima[rung][dtype][op]
        except KeyError:
            raise Inconclusive(
                f"the calibration has no clean runs of {op} in {dtype} ({rung}); run `python -m oracle calibrate`"
            ) from None
        return self.factor * aggregate, self.factor * worst


RECALIBRATE = "`python -m oracle calibrate --quick --out FILE` measures it here; pass --calibration FILE"
"""The remedy, where the stored limits are those of another environment."""


@cache
def stored_calibration() -> Calibration:
    """The calibration that comes with the oracle.

    Raises:
        Inconclusive: there is none.
    """
    if not CALIBRATION.exists():
        raise Inconclusive(f"{CALIBRATION.name} is missing; run `python -m oracle calibrate`")
    return load(CALIBRATION)


def load(path: Path) -> Calibration:
    """A calibration file.

    Raises:
        InputError: it is not one.
    """
    try:
        stored = json.loads(path.read_text())
        found = {key: stored[key] for key in ("version", "factor", "maxima", "environment")}
    except OSError as error:
        raise InputError(
            f"cannot read the calibration {path}: {error.strerror}; `python -m oracle calibrate --out {path}` makes one"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a calibration; {_MAKE}") from error
    problem = _problem(**found)
    if problem:
        raise InputError(f"{path} is not a calibration: {problem}; {_MAKE}")
    environment = found["environment"]
    missing = [key for key in IDENTITY if not isinstance(environment.get(key), str)]
    if missing:
        raise InputError(f"the calibration {path} does not say its {first(missing)}; make it again")
    return Calibration(float(found["factor"]), found["maxima"], environment)


_MAKE = "`python -m oracle calibrate --out FILE` makes one"
_FACTORS = (1.0, 100.0)
"""Below, clean runs would fail; above, nothing would."""


def _problem(version: object, factor: object, maxima: object, environment: object) -> str:
    """What of a calibration's values cannot be; empty if all can."""
    if type(version) is not int or version != VERSION:
        return f"its version is {reprlib.repr(version)}, expected {VERSION}"
    if not _is_number(factor) or not _FACTORS[0] <= factor <= _FACTORS[1]:
        return f"its factor is {reprlib.repr(factor)}, expected a number from {_FACTORS[0]:g} to {_FACTORS[1]:g}"
    if not isinstance(environment, dict):
        return "its environment is no table"
    place = _wrong_maximum(maxima)
    return f"its maxima {place}, expected [aggregate, worst] by rung, dtype and op" if place else ""


def _wrong_maximum(maxima: object) -> str:
    """Which of the largest ratios is none, and what it is."""
    if not isinstance(maxima, dict):
        return f"are {reprlib.repr(maxima)}"
    for rung, dtypes in maxima.items():
        for dtype, ops in dtypes.items() if isinstance(dtypes, dict) else [("", None)]:
            for op, pair in ops.items() if isinstance(ops, dict) else [("", None)]:
                if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_ratio, pair)):
                    what = "" if pair is None else f" {reprlib.repr(pair)}"
                    return f"hold no two ratios{what} at {' '.join(filter(None, (rung, dtype, op)))[:80]}"
    return ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _is_ratio(value: object) -> bool:
    return _is_number(value) and 0 <= value <= _LARGEST_RATIO


_LARGEST_RATIO = 1e9
"""Clean runs have none near it."""
VERSION = 2
"""Of the calibration file."""


IDENTITY = ("backend", "jax", "torch")
"""What of an environment decides its noise: another backend, or another minor version of either framework."""


def staleness(calibrated: Mapping[str, Any], running: Mapping[str, Any]) -> str:
    """How the environment of a calibration differs from the running one so that its limits mean nothing; or ""."""
    if not calibrated:  # made in memory, for this run
        return ""
    differing = [key for key in IDENTITY if _minor(str(calibrated.get(key))) != _minor(str(running[key]))]
    if not differing:
        return ""
    was, now = ([f"{key} {place.get(key)}" for key in differing] for place in (calibrated, running))
    return f"the noise was calibrated with {', '.join(was)}, this is {', '.join(now)}: {RECALIBRATE}"


def _minor(version: str) -> str:
    """`2.13` of `2.13.0+cpu`; a name as it is."""
    return ".".join(version.split(".")[:2])
