"""From the records of clean runs to limits, and what can be said about them.

Beside the largest ratios a calibration tells how they grew with the number of runs,
how much room the limits of one half of the runs leave the other half, and which
relative error trips them: a limit that no fault can trip is a defect.
"""

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oracle import noise
from oracle.clean import Record

EXAMPLES = (10, 100)
"""Numbers of runs at which growth is told."""
SHOWN = 6
Table = dict[str, dict[str, dict[str, Any]]]
"""By rung, dtype and op."""
Ratios = Sequence[float]
"""Aggregate, worst, unit."""


def document(records: Sequence[Record], factor: float) -> dict[str, Any]:
    """The calibration file, but for where it was measured."""
    shuffled = sorted(records, key=lambda record: hashlib.sha256(record["run"].encode()).digest())
    by_op = _by_op(shuffled)
    return {
        "version": noise.VERSION,
        "factor": factor,
        "runs": [record["run"] for record in records],
        "maxima": _table(by_op, lambda of: [_rounded(value) for value in largest(of)]),
        "growth": _table(by_op, lambda of: [_rounded(share) for share in growth(of)]),
        "headroom": _table(by_op, lambda of: _rounded(headroom(of, factor))),
        "trips": _table(by_op, lambda of: [_rounded(value) for value in trips(of, factor)]),
    }


def _by_op(records: Sequence[Record]) -> Mapping[tuple[str, str, str], list[Ratios]]:
    found: dict[tuple[str, str, str], list[Ratios]] = {}
    for record in records:
        for rung, ops in record["ratios"].items():
            for op, ratios in ops.items():
                found.setdefault((rung, record["dtype"], op), []).append(ratios)
    return found


def _table(by_op: Mapping[tuple[str, str, str], list[Ratios]], of: Callable[[list[Ratios]], Any]) -> Table:
    table: Table = {}
    for (rung, dtype, op), ratios in by_op.items():
        table.setdefault(rung, {}).setdefault(dtype, {})[op] = of(ratios)
    return table


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if value != float("inf") else None


def largest(runs: Sequence[Ratios]) -> tuple[float, float]:
    """The largest aggregate and worst ratio."""
    return max(ratios[0] for ratios in runs), max(ratios[1] for ratios in runs)


def growth(runs: Sequence[Ratios]) -> list[float]:
    """Which share of its maximum had been reached after 10 and after 100 runs, by the ratio that grew more since."""
    return [_share(largest(runs[:count]), largest(runs)) for count in EXAMPLES]


def _share(reached: tuple[float, float], final: tuple[float, float]) -> float:
    return min(1.0 if not whole else part / whole for part, whole in zip(reached, final, strict=True))


def headroom(runs: Sequence[Ratios], factor: float) -> float:
    """How many times larger the limits that half of the runs give are than any ratio of the other half.

    Below 1 a clean run would have alarmed. Infinite where everything was exact.
    """
    halves = [largest(half) for half in (runs[::2], runs[1::2]) if half]
    if len(halves) < 2:
        return float("inf")
    pairs = [(own, other) for a, b in (halves, halves[::-1]) for own, other in zip(a, b, strict=True)]
    return min((factor * own / other for own, other in pairs if other), default=float("inf"))


def trips(runs: Sequence[Ratios], factor: float) -> tuple[float, float]:
    """The relative error of a whole tensor that exceeds the aggregate limit: in the median run, and in any run."""
    limit = factor * largest(runs)[0]
    units = [limit * ratios[2] for ratios in runs]
    return statistics.median(units), max(units)


# -- In words --------------------------------------------------------------------------


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """What a calibration found, for the terminal."""
    yield f"{len(document['runs'])} clean runs; a limit is {document['factor']:g} times the largest ratio"
    rooms = sorted((room, place) for place, room in flat(document["headroom"]) if room is not None)
    yield "least room that the limits of half of the runs leave the other half:"
    yield from (f"  {room:5.2f} times  {place}" for room, place in rooms[:SHOWN])
    grown = sorted((shares, place) for place, shares in flat(document["growth"]))
    yield f"largest growth: share of the final maximum after {EXAMPLES[0]} and {EXAMPLES[1]} runs:"
    yield from (f"  {few:.2f} {many:.2f}  {place}" for (few, many), place in grown[:SHOWN])
    yield "relative error of a whole tensor that exceeds its limit, largest first:"
    blind = sorted(((any_run, place) for place, (_, any_run) in flat(document["trips"])), reverse=True)
    for rung_dtype in dict.fromkeys(place.rpartition(" ")[0] for _, place in blind):
        error, place = next(item for item in blind if item[1].startswith(rung_dtype + " "))
        yield f"  {error:8.1e}  {place}"


def flat(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """(`rung dtype op`, value) of a table."""
    for rung, dtypes in table.items():
        for dtype, ops in dtypes.items():
            for op, value in ops.items():
                yield f"{rung} {dtype} {op}", value
