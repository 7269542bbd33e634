"""HTML built of elements, so that text can only ever be text.

Every child and attribute that is not `Markup` itself is escaped.
"""

import html
from collections.abc import Iterable


class Markup(str):
    """HTML: made here from text and elements, never from a report's own words."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Text as HTML."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Text and elements, one after the other."""
    return Markup(escape(between).join(map(escape, parts)))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; `class_` is the attribute `class`, `data_x` is `data-x`, None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")
