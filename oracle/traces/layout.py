"""How one program lays out the axes of what another holds otherwise, in the notation of einops.

`B T (N H) -> B N T H` splits the last axis and puts heads before time. Named axes are
separated by spaces, merged ones are in parentheses; a pattern says nothing of sizes.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxgpt.errors import InputError

Shape = tuple[int, ...]
Side = tuple[tuple[str, ...], ...]
"""The axes of an array, each of one or more named ones."""
_MOST_AXES = 5
"""Of arrays for which layouts are guessed: the number of permutations explodes."""


@dataclass(frozen=True)
class Layout:
    """A pattern for given shapes."""

    atoms: Shape
    """The first array's shape with every merged axis split."""
    order: tuple[int, ...]
    """Which of those axes comes where."""
    shape: Shape
    """Of the second array."""

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The array in the second layout; a view where no axis has to be merged."""
        return array.reshape(self.atoms).transpose(self.order).reshape(self.shape)

    def origin(self, flat: np.ndarray) -> np.ndarray:
        """Where in the first array, flattened, the elements at `flat` of the second come from."""
        places = np.unravel_index(flat, [self.atoms[axis] for axis in self.order])
        by_atom = [places[self.order.index(axis)] for axis in range(len(self.order))]
        return np.ravel_multi_index(by_atom, self.atoms) if self.atoms else flat


@dataclass(frozen=True)
class Pattern:
    """`before -> after`."""

    before: Side
    after: Side

    def __str__(self) -> str:
        return f"{_text(self.before)} -> {_text(self.after)}"

    def fit(self, before: Shape, after: Shape) -> Layout | None:
        """The layout that takes an array of one shape to the other; None where the sizes do not allow it."""
        sizes = _sizes([*zip(self.before, before, strict=False), *zip(self.after, after, strict=False)])
        if (len(before), len(after)) != (len(self.before), len(self.after)) or sizes is None:
            return None
        names = [name for axis in self.before for name in axis]
        order = [names.index(name) for axis in self.after for name in axis]
        return Layout(tuple(sizes[name] for name in names), tuple(order), after)


def parse(text: str) -> Pattern:
    """A pattern as it is written.

    Raises:
        InputError: not of the form `a b (c d) -> …` with the same names on both sides.
    """
    before, arrow, after = text.partition("->")
    sides = [_side(before), _side(after)]
    if not arrow or None in sides:
        raise InputError(f"{text.strip()!r} is no layout; write one such as `B T (N H) -> B N T H`")
    pattern = Pattern(*[side for side in sides if side is not None])
    names = [sorted(name for axis in side for name in axis) for side in (pattern.before, pattern.after)]
    if names[0] != names[1] or len(set(names[0])) != len(names[0]):
        raise InputError(f"the layout {text.strip()!r} must have the same axes on both sides, each once")
    return pattern


def _side(text: str) -> Side | None:
    if not re.fullmatch(r"(\s*(\w+|\(\s*\w+(\s+\w+)*\s*\)))*\s*", text):
        return None
    return tuple(tuple(part.strip("()").split()) for part in re.findall(r"\w+|\([^)]*\)", text))


def _text(side: Side) -> str:
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in side)


def _sizes(axes: Sequence[tuple[tuple[str, ...], int]]) -> dict[str, int] | None:
    """The size of every named axis, or None if there is no such."""
    sizes: dict[str, int] = {}
    for axis, size in sorted(axes, key=lambda item: len(item[0])):
        known = math.prod(sizes[name] for name in axis if name in sizes)
        unknown = [name for name in axis if name not in sizes]
        if len(unknown) > 1 or (known == 0 and size != 0):
            return None
        if unknown:
            sizes[unknown[0]] = size // known if known else 0
        if math.prod(sizes[name] for name in axis) != size:
            return None
    return sizes


# -- Guessing --------------------------------------------------------------------------


def possible(before: Shape, after: Shape) -> Iterator[Pattern]:
    """Patterns that would take one shape to the other: axes in another order, or two of them merged or split."""
    if math.prod(before) != math.prod(after) or max(len(before), len(after)) > _MOST_AXES:
        return
    if len(before) == len(after):
        yield from _permutations(before, after)
    elif len(before) == len(after) + 1:
        yield from _merges(before, after)
    elif len(before) + 1 == len(after):
        yield from (Pattern(pattern.after, pattern.before) for pattern in _merges(after, before))


def _permutations(before: Shape, after: Shape) -> Iterator[Pattern]:
    names = _letters(before)
    for order in itertools.permutations(range(len(before))):
        if tuple(before[axis] for axis in order) == after:
            yield Pattern(names, tuple(names[axis] for axis in order))


def _merges(before: Shape, after: Shape) -> Iterator[Pattern]:
    names = _letters(before)
    for order in itertools.permutations(range(len(before))):
        for at in range(len(after)):
            groups = [order[:at], order[at : at + 2], order[at + 2 :]]
            merged = [*((axis,) for axis in groups[0]), groups[1], *((axis,) for axis in groups[2])]
            if tuple(math.prod(before[axis] for axis in group) for group in merged) == after:
                yield Pattern(names, tuple(tuple(names[axis][0] for axis in group) for group in merged))


def _letters(shape: Shape) -> Side:
    return tuple((letter,) for letter in "abcdefgh"[: len(shape)])
