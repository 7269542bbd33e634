"""Layers × taps: how far each comparison is beyond its limit, as a table of coloured cells.

The scale is logarithmic and its steps differ in lightness, so that it reads in grey
and with any colour vision; a cell beyond its limit also carries the number of its step.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from oracle.reports import wording
from oracle.reports.markup import Markup, join, tag
from oracle.reports.typesetting import number
from oracle.results import Finding, RungResult

WITHIN = (0.1, 1 / 3, 1.0)
"""Upper ends of the steps within the limit, in multiples of the limit."""
BEYOND = (3.0, 10.0, 100.0, 1e3, 1e4, 1e6, float("inf"))
"""Upper ends of the steps beyond it."""
LABELS = ("3", "10", "100", "1,000", "10⁴", "10⁶", "more")
MOST_COLUMNS = 128
"""A deeper model shows so many groups of layers, each by its worst."""
MOST_ROWS = 160

_LAYER = re.compile(r"layers\.([0-9]{1,6})(?:\.(.+))?")
_OWN_ROW = {"kl": "KL per token", "greedy": "greedy tokens"}
"""Ops that are not the tap's own: they compare something made of it."""


def multiple(found: Finding) -> float:
    """The error in multiples of its limit; infinite for a difference that has no size."""
    pairs = zip((found.aggregate, found.worst), found.threshold, strict=True)
    ratio = max((value / limit for value, limit in pairs if limit > 0), default=0.0)
    if found.ok:
        return min(ratio, 1.0)
    return ratio if ratio > 1 and not found.problem else float("inf")


@dataclass
class Cell:
    """All comparisons of one tap in one layer (or group of layers)."""

    count: int = 0
    broken: int = 0
    worst: Finding | None = None
    first_broken: Finding | None = None

    def add(self, found: Finding) -> None:
        """Count one more; a broken one is worse than any that holds."""
        self.count += 1
        if not found.ok:
            self.broken += 1
            self.first_broken = self.first_broken or found
        if self.worst is None or (not found.ok, multiple(found)) > (not self.worst.ok, multiple(self.worst)):
            self.worst = found


@dataclass
class Grid:
    """A rung's comparisons by tap and layer, in execution order."""

    rung: str
    layers: int = 0
    before: dict[str, Cell] = field(default_factory=dict)
    """Taps outside the layers, before the first of them."""
    inside: dict[str, dict[int, Cell]] = field(default_factory=dict)
    behind: dict[str, Cell] = field(default_factory=dict)
    """Taps outside the layers, after the first of them."""

    @property
    def is_measured(self) -> bool:
        """Some difference has a size, so that there is a scale."""
        return any(cell.worst and max(cell.worst.threshold) > 0 for cell in self.cells())

    @property
    def group(self) -> int:
        """Layers in one column."""
        return -(-self.layers // MOST_COLUMNS) or 1

    def cells(self) -> Iterable[Cell]:
        """All of them."""
        yield from self.before.values()
        for row in self.inside.values():
            yield from row.values()
        yield from self.behind.values()


def arrange(rung: RungResult) -> Grid:
    """The grid of a rung."""
    placed = [(_position(rung.name, found), found) for found in rung.findings]
    layers = max((layer + 1 for (layer, _), _ in placed if layer is not None), default=0)
    grid = Grid(rung.name, layers)
    for (layer, row), found in placed:
        if layer is not None:
            cells = grid.inside.setdefault(row, {})
            cells.setdefault(layer // grid.group, Cell()).add(found)
        elif row in grid.before or not (grid.inside or row in grid.behind):
            grid.before.setdefault(row, Cell()).add(found)
        else:
            grid.behind.setdefault(row, Cell()).add(found)
    return grid


def _position(rung: str, found: Finding) -> tuple[int | None, str]:
    place = wording.place(rung, found)
    if found.op in _OWN_ROW:
        return None, _OWN_ROW[found.op]
    match = _LAYER.fullmatch(place)
    return (int(match[1]), match[2] or "(layer)") if match else (None, place)


# -- As a table ------------------------------------------------------------------------


def render(rung: RungResult, title: str, explanation: str) -> Markup:
    """The figure of one rung."""
    grid = arrange(rung)
    columns = -(-grid.layers // grid.group)
    rows = _shortened([*_rows(grid, columns, rung.first)])
    head = tag("thead", tag("tr", tag("th", "layer", scope="col"), *_heads(grid, columns))) if columns else ""
    caption = tag("caption", tag("strong", title), explanation)
    table = tag("table", caption, head, tag("tbody", *rows), class_="map")
    region = {"role": "region", "aria-label": title, "tabindex": "0"}
    width = "many" if columns > 16 else "few" if columns <= 8 else None
    return tag("figure", tag("div", table, class_="scroll", **region), class_=width)


def _rows(grid: Grid, columns: int, first: Finding | None) -> Iterable[tuple[bool, Markup]]:
    """Each row, and whether something in it is beyond its limit."""
    outside = str(columns) if columns > 1 else None
    for row, cell in grid.before.items():
        yield bool(cell.broken), _row(row, [_cell(cell, first, outside)])
    for row, cells in grid.inside.items():
        drawn = [_cell(cells[c], first) if c in cells else tag("td", class_="none") for c in range(columns)]
        yield any(cell.broken for cell in cells.values()), _row(row, drawn)
    for row, cell in grid.behind.items():
        yield bool(cell.broken), _row(row, [_cell(cell, first, outside)])


def _row(name: str, cells: Sequence[Markup]) -> Markup:
    return tag("tr", tag("th", tag("code", name), scope="row"), *cells)


def _shortened(rows: Sequence[tuple[bool, Markup]]) -> list[Markup]:
    """No more than a page can show, those beyond a limit before the others."""
    kept = sorted(range(len(rows)), key=lambda i: not rows[i][0])[:MOST_ROWS]
    shown = [rows[i][1] for i in sorted(kept)]
    more = len(rows) - len(shown)
    return [*shown, tag("tr", tag("th", f"and {more:,} more", scope="row"))] if more else shown


def _heads(grid: Grid, columns: int) -> Iterable[Markup]:
    for column in range(columns):
        start = column * grid.group
        # A group shows its first layer; two digits are what a narrow column has room for.
        shown = str(start) if columns <= 32 or column % 4 == 0 else ""
        yield tag("th", shown, scope="col", **{"aria-label": f"layer {start}"} if not shown else {})


def _cell(cell: Cell, first: Finding | None, span: str | None = None) -> Markup:
    assert cell.worst is not None
    value = multiple(cell.worst)
    if cell.broken:
        step = bisect_left(BEYOND, max(value, 1.0)) + 1
        sized = max(cell.worst.threshold) > 0 and not cell.worst.problem
        name, text = f"b{step}", str(step) if sized else "!"
    else:
        name, text = f"w{bisect_left(WITHIN, value) + 1}", ""
    if first is not None and cell.first_broken is first:
        name += " first"
    return tag("td", text, class_=name, colspan=span, title=describe(cell))


def describe(cell: Cell) -> str:
    """What a cell says when it is pointed at or focused: one fact a line."""
    found = cell.worst
    assert found is not None
    lines = [f"{found.tap or 'the rung'} · {found.op}" if found.op else found.tap]
    if max(found.threshold) > 0:
        lines += _measures(found)
    elif found.ok:
        lines.append("equal")
    if found.problem:
        lines.append(found.problem)
    if cell.count > 1:
        share = f"{cell.broken:,} beyond the limit" if cell.broken else "all within their limits"
        lines.append(f"the worst of {cell.count:,} comparisons, {share}")
        if cell.first_broken is not None and cell.first_broken.where:
            lines.append(f"first at: {cell.first_broken.where}")
    if found.where:
        lines.append(f"here: {found.where}")
    return "\n".join(lines)


def _measures(found: Finding) -> Iterable[str]:
    value = multiple(found)
    if found.ok:
        yield "within its limit"
    elif value < float("inf"):
        yield f"{number(value)} times its limit"
    yield f"error {number(found.error)}"
    for label, ratio, limit in (
        ("whole tensor", found.aggregate, found.threshold[0]),
        ("worst position", found.worst, found.threshold[1]),
    ):
        yield f"{label}: {number(ratio)} × noise (limit {number(limit)})"


# -- The key ---------------------------------------------------------------------------


def key(measured: bool) -> Markup:
    """What the colours and numbers mean."""
    if not measured:
        steps = [_swatch("w1", "", "equal"), _swatch("b7", "!", "differs")]
    else:
        steps = [_swatch(f"w{i}", "", label) for i, label in enumerate(("≤ ⅒", "≤ ⅓", "≤ 1"), start=1)]
        steps += [
            _swatch(f"b{i}", str(i), label if label == "more" else f"≤ {label}")
            for i, label in enumerate(LABELS, start=1)
        ]
        steps.append(_swatch("b7", "!", "no size: missing, not finite, another shape or pattern"))
    steps += [_swatch("w1 first", "", "the first beyond its limit")]
    lead = "Error in multiples of its limit:" if measured else "Key:"
    return tag("p", lead, " ", join(steps, " "), class_="key")


def _swatch(name: str, text: str, label: str) -> Markup:
    return tag("span", tag("i", text, class_=name), " ", label)
