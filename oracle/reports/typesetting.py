"""Numbers and names as a page sets them."""

import math
import re

from oracle.reports.markup import Markup, escape, join, tag

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_POWER = re.compile(r"(\d+(?:\.\d+)?)e([+-]\d+)")
_PATH = re.compile(r"`[^`]+`|\b[\w-]+(?:/[\w.-]+)*\.(?:py|json|md|safetensors|txt)\b")


def powers(text: str) -> str:
    """`3.1e-08` as `3.1 × 10⁻⁸` without breaks, `5.1e+02` as `510`."""
    return _POWER.sub(_power, text)


def _power(match: re.Match[str]) -> str:
    exponent = int(match[2])
    if -3 < exponent < 4:
        return f"{float(match[0]):g}"
    return f"{match[1]}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(exponent).translate(_SUPERSCRIPT)}"


def number(value: float, digits: int = 2) -> str:
    """With so many significant digits; as a power of ten only where it is far from 1."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if 1000 <= abs(value) < 1e6:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    if 10**digits <= abs(value) < 1000:
        return f"{value:.0f}"
    return powers(f"{value:.{digits}g}")


def prose(text: str) -> Markup:
    """A sentence of the report: powers of ten set, names of files as code."""
    parts: list[object] = []
    end = 0
    for match in _PATH.finditer(text):
        parts += [powers(text[end : match.start()]), tag("code", match[0].strip("`"))]
        end = match.end()
    return join([*parts, powers(text[end:])])


def name(text: str) -> Markup:
    """A tap or a parameter."""
    return tag("code", text) if text else escape("–")
