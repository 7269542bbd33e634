"""Small drawings in SVG. Positions across are in per cent, so that they fit any width without shrinking."""

import math
from collections.abc import Sequence

from oracle.reports.markup import Markup, tag
from oracle.reports.typesetting import number

HEIGHT = 44
WIDEST = 6.0
"""Of the bars, in per cent: few bars stay bars."""


def bars(values: Sequence[float], size: int, axis: str) -> Markup:
    """The profile of an error along an axis of `size` indices, one bar for each index or bin."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    top = max(finite, default=0.0) or 1.0
    width = 100 / max(len(values), 1)
    drawn = [
        tag(
            "rect",
            tag("title", f"{axis} {_indices(i, len(values), size)}: {number(values[i])}"),
            x=f"{i * width:.3f}%",
            y=f"{HEIGHT * (1 - value / top):.1f}",
            width=f"{min(width * 0.86, WIDEST):.3f}%",
            height=f"{max(HEIGHT * value / top, 0.5):.1f}",
        )
        for i, value in enumerate(finite)
    ]
    label = f"Error along {axis}: between {number(min(finite, default=0.0))} and {number(max(finite, default=0.0))}"
    return tag("svg", *drawn, class_="bars", height=str(HEIGHT), role="img", **{"aria-label": label})


def _indices(bar: int, bars: int, size: int) -> str:
    """The indices in a bin, as `np.array_split` cuts them."""
    small, larger = divmod(max(size, bars), bars)
    start = bar * small + min(bar, larger)
    end = start + small + (bar < larger) - 1
    return str(start) if end == start else f"{start}–{end}"


def fall(before: float, after: float, limit: float) -> Markup:
    """An error before and after a repair on a logarithmic axis, the noise's band at its left."""
    low, high = -2.0, math.ceil(math.log10(min(max(before, limit, 10.0), 1e15))) + 0.4

    def at(value: float) -> float:
        power = math.log10(min(max(value, 10**low), 10**high))
        return 100 * (power - low) / (high - low)

    start, end = at(before), at(after)
    decades = [tag("line", x1=f"{at(10.0**p):.2f}%", x2=f"{at(10.0**p):.2f}%", y1="38", y2="42") for p in _ticks(high)]
    ticks = [
        tag("text", number(10.0**p) if p < 3 else f"10{_up(p)}", x=f"{at(10.0**p):.2f}%", y="55") for p in _ticks(high)
    ]
    drawn = [
        tag("rect", class_="band", x="0", y="18", width=f"{at(limit):.2f}%", height="20"),
        tag("line", class_="axis", x1="0", x2="100%", y1="38", y2="38"),
        *decades,
        *ticks,
        tag("line", class_="way", x1=f"{end:.2f}%", x2=f"{start:.2f}%", y1="28", y2="28"),
        tag("circle", class_="before", cx=f"{start:.2f}%", cy="28", r="5"),
        tag("circle", class_="after", cx=f"{end:.2f}%", cy="28", r="5"),
        tag("text", "before", class_="label", x=f"{start:.2f}%", y="13"),
        tag("text", "after", class_="label", x=f"{end:.2f}%", y="13") if abs(start - end) > 15 else "",
    ]
    label = f"{number(before)} times the noise before, {number(after)} after; the limit is {number(limit)}"
    return tag("svg", *drawn, class_="fall", height="58", role="img", **{"aria-label": label})


def _ticks(high: float) -> range:
    return range(-2, int(high) + 1, 1 if high < 5 else 2 if high < 9 else 3)


def _up(power: int) -> str:
    return str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
