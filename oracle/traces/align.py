"""Which tap of one trace is which of the other: by rule, by name; and guesses for the rest.

A guess is never used. It is printed as a line for a map file, for a person to judge:
a comparison that chose its own alignment could align a fault away.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxgpt.errors import InputError
from oracle.traces import layout, name_map
from oracle.traces.layout import Pattern
from oracle.traces.name_map import Rule
from oracle.traces.trace import EXACT_KINDS

Taps = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """Two taps that should be equal."""

    a: str
    b: str
    layout: Pattern | None = None
    """How B's axes become A's; None where they are alike."""


@dataclass(frozen=True)
class Alignment:
    """Every tap of both sides, in execution order."""

    order: Sequence[str]
    """All taps of A."""
    pairs: Sequence[Pair]
    """In the order of A."""
    only_a: Sequence[str]
    only_b: Sequence[str]
    waived: Sequence[str]
    """Taps of either side that the map says have no counterpart."""
    wanted: Mapping[str, str]
    """What the map calls in B those of A that B lacks under that name."""


def align(a: Sequence[str], b: Sequence[str], rules: Sequence[Rule] = (), unrecorded: Sequence[str] = ()) -> Alignment:
    """Pair the names of two traces; `unrecorded` are taps of B that could not be recorded.

    Raises:
        InputError: a rule that matches nothing or leads to nothing, or two taps of A that map to one of B.
    """
    name_map.refuse_idle(rules, a, [*b, *unrecorded])
    waived_b = {name for name in b if any(rule.in_b and rule.match.fullmatch(name) for rule in rules)}
    present = set(b) - waived_b
    pairs: list[Pair] = []
    only_a: list[str] = []
    waived: list[str] = []
    wanted: dict[str, str] = {}
    for name in a:
        rule = next((rule for rule in rules if not rule.in_b and rule.match.fullmatch(name)), None)
        other = name if rule is None else rule.counterpart(name)
        if other is None:
            waived.append(name)
        elif other in present:
            pairs.append(Pair(name, other, rule.layout if rule else None))
        else:
            only_a.append(name)
            wanted |= {name: other} if other != name else {}
    _refuse_sharing(pairs)
    taken = {pair.b for pair in pairs} | waived_b
    only_b = [name for name in b if name not in taken]
    return Alignment(a, pairs, only_a, only_b, [*waived, *(name for name in b if name in waived_b)], wanted)


def _refuse_sharing(pairs: Sequence[Pair]) -> None:
    owners: dict[str, str] = {}
    for pair in pairs:
        if pair.b in owners:
            raise InputError(f"{owners[pair.b]} and {pair.a} of A are both mapped to {pair.b} of B; correct the map")
        owners[pair.b] = pair.a


# -- Suggestions -----------------------------------------------------------------------

SAMPLES = 1024
"""Elements by which two taps are compared."""
LIKELY = 0.7
"""Correlation from which on a pair is suggested: behind a fault the right pair may have lost some."""
CERTAIN = 0.999
"""Correlation from which on a pair is suggested even out of order."""


@dataclass(frozen=True)
class Suggestion:
    """A pair that might be one."""

    a: str
    b: str
    layout: Pattern | None
    correlation: float

    def rule(self) -> str:
        """The line for a map file."""
        return f"{self.a} = {self.b}" + (f" : {self.layout}" if self.layout else "")


def suggest(a: Taps, b: Taps, only_a: Sequence[str], only_b: Sequence[str]) -> list[Suggestion]:
    """Pairs of unpaired taps with correlated values, one to one; in order unless they are unmistakable."""
    scores, layouts = _correlations(a, b, only_a, only_b)
    chosen = _in_order(scores)
    used_a, used_b = {i for i, _ in chosen}, {j for _, j in chosen}
    for i, j in sorted(np.argwhere(scores >= CERTAIN).tolist(), key=lambda at: -scores[at[0], at[1]]):
        if i not in used_a and j not in used_b:
            chosen.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return [Suggestion(only_a[i], only_b[j], layouts.get((i, j)), min(scores[i, j], 1.0)) for i, j in sorted(chosen)]


def _correlations(
    a: Taps, b: Taps, only_a: Sequence[str], only_b: Sequence[str]
) -> tuple[np.ndarray, dict[tuple[int, int], Pattern]]:
    """The best correlation of each pair over all layouts; a little is added for names that are alike."""
    scores = np.zeros((len(only_a), len(only_b)))
    layouts: dict[tuple[int, int], Pattern] = {}
    for shape_a, rows in _by_shape(a, only_a).items():
        for shape_b, columns in _by_shape(b, only_b).items():
            for pattern in layout.possible(shape_b, shape_a):
                found = _sampled_correlations([a[only_a[i]] for i in rows], [b[only_b[j]] for j in columns], pattern)
                for x, y in np.argwhere(found >= LIKELY):
                    at = rows[x], columns[y]
                    score = found[x, y] + 1e-4 * _likeness(str(only_a[at[0]]), str(only_b[at[1]]))
                    # The layout without any change comes first, and is preferred to one as good.
                    if score > scores[at] + 1e-6:
                        scores[at] = score
                        layouts |= {at: pattern}
    return scores, {at: pattern for at, pattern in layouts.items() if pattern.before != pattern.after}


def _by_shape(taps: Taps, names: Sequence[str]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, name in enumerate(names):
        if taps[name].size > 1 and taps[name].dtype.kind not in EXACT_KINDS:
            groups.setdefault(taps[name].shape, []).append(index)
    return groups


def _sampled_correlations(a: Sequence[np.ndarray], b: Sequence[np.ndarray], pattern: Pattern) -> np.ndarray:
    size = a[0].size
    flat = np.random.default_rng(0).choice(size, SAMPLES, replace=False) if size > 8 * SAMPLES else np.arange(size)
    fitted = pattern.fit(b[0].shape, a[0].shape)
    assert fitted is not None
    ours, theirs = _centred(a, flat), _centred(b, fitted.origin(flat))
    return ours @ theirs.T


def _centred(arrays: Sequence[np.ndarray], flat: np.ndarray) -> np.ndarray:
    """Rows of unit length and mean zero, so that products are correlations; zeros where there is none."""
    rows = np.stack([array.reshape(-1)[flat].astype(np.float64) for array in arrays])
    # Masked scores are hidden by different numbers in different programs.
    rows = np.where(np.isfinite(rows) & (np.abs(rows) < 1e30), rows, 0.0)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _likeness(a: str, b: str) -> float:
    ours, theirs = (set(re.split(r"[._#/]", name.lower())) for name in (a, b))
    return len(ours & theirs) / len(ours | theirs)


def _in_order(scores: np.ndarray) -> list[tuple[int, int]]:
    """The pairs, ascending in both, whose scores have the largest sum (as sequences are aligned)."""
    m, n = scores.shape
    best = np.zeros((m + 1, n + 1))
    for i in range(m):
        # Taking (i, j), or leaving i or j out: the latter two as a running maximum along the row.
        best[i + 1, 1:] = np.maximum(best[i, 1:], best[i, :-1] + scores[i])
        best[i + 1] = np.maximum.accumulate(best[i + 1])
    pairs: list[tuple[int, int]] = []
    i, j = m, n
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def generalised(suggestions: Sequence[Suggestion]) -> list[tuple[str, float]]:
    """The suggestions as rules, layers that differ only in their number as one; each with its lowest correlation."""
    rules: dict[str, list[Suggestion]] = {}
    for suggestion in suggestions:
        rules.setdefault(_starred(suggestion), []).append(suggestion)
    found: list[tuple[str, float]] = []
    for rule, group in rules.items():
        lines = [rule] if len(group) > 1 else [group[0].rule()]
        found += [(line, min(suggestion.correlation for suggestion in group)) for line in lines]
    return found


def _starred(suggestion: Suggestion) -> str:
    """Numbers that stand alone between dots become `*`, if they are the same on both sides."""
    a, b = suggestion.a.split("."), suggestion.b.split(".")
    if [part for part in a if part.isdigit()] != [part for part in b if part.isdigit()]:
        return suggestion.rule()
    starred = [".".join("*" if part.isdigit() else part for part in parts) for parts in (a, b)]
    return f"{starred[0]} = {starred[1]}" + (f" : {suggestion.layout}" if suggestion.layout else "")
