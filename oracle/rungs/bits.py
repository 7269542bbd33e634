"""Rung bits: every parameter against the Hugging Face files, element by element.

The files are read and named independently of the product (`oracle.folder`). Both
the source folder, if there is one, and the candidate's own export are compared, so
import and export are each checked by themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import weights
from oracle import folder, noise, residual
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import Finding, Residual, RungResult
from oracle.site import Site

NAME = "bits"
EMBEDDING, HEAD = "embed.tokens.weight", "head.weight"
SAMPLED = 16
"""A cheap look at a tensor takes so many indices of each axis."""


def run(candidate: Candidate, export: Path | None, source: Path | None) -> RungResult:
    """Compare with `source` first (where a wrong parameter comes from), then with the `export`."""
    findings: list[Finding] = []
    for place, label in ((source, "reference"), (export, "export")):
        if place is not None:
            findings += compare(candidate, tensors(place), label)
    equal = sum(finding.ok for finding in findings)
    return RungResult(
        NAME, findings, f"{equal} of {len(findings)} comparisons bit for bit against {_places(export, source)}"
    )


def tensors(place: Path) -> Mapping[str, np.ndarray]:
    """A folder's tensors under our names; mapped into memory once, for every parameter that is looked at."""
    return _tensors(place, tuple((file.name, file.stat().st_mtime_ns) for file in sorted(place.glob("*.safetensors*"))))


@lru_cache(maxsize=2)
def _tensors(place: Path, files: tuple[tuple[str, int], ...]) -> Mapping[str, np.ndarray]:
    return folder.parameters(folder.read(place))


def forget() -> None:
    """Unmap the files: their pages count as memory of this process."""
    _tensors.cache_clear()


def _places(export: Path | None, source: Path | None) -> str:
    if source is None:
        return "the export only (no --reference)"
    return "the reference and the export" if export else "the reference"


def compare(candidate: Candidate, file: Mapping[str, np.ndarray], label: str) -> Iterator[Finding]:
    """One finding per parameter, in execution order, then one per tensor that only the file has."""
    expected = [parameter.name for parameter in weights.parameters(candidate.config)]
    repeated = [HEAD] if candidate.config.tie_word_embeddings and HEAD in file else []
    extra = sorted(candidate.stored.keys() - set(expected))
    for name in dict.fromkeys([*repeated, *expected, *extra, *sorted(file)]):
        yield _finding(name, label, problem(candidate, file, name, label))


def problem(candidate: Candidate, file: Mapping[str, np.ndarray], name: str, label: str) -> str:
    """What is wrong with one parameter, or nothing. A tied head is right if the file's is its embedding."""
    ours, theirs = candidate.stored.get(name), file.get(name)
    if name == HEAD and candidate.config.tie_word_embeddings and theirs is not None and EMBEDDING in file:
        return difference(file[EMBEDDING], theirs)
    if ours is None and theirs is None:
        return ""
    if ours is None:
        expected = any(parameter.name == name for parameter in weights.parameters(candidate.config))
        return "the candidate lacks it" if expected else f"only the {label} has it"
    return f"the {label} lacks it" if theirs is None else difference(np.asarray(ours), theirs)


def _finding(name: str, label: str, problem: str) -> Finding:
    module, _, leaf = name.rpartition(".")
    return Finding(tap=module, op=leaf, ok=not problem, where=label, problem=problem)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """What differs between a parameter and the file's tensor, or nothing.

    They are equal if every element of the file, in the dtype of its header, is held
    exactly; a wider dtype on our side may hold it, a narrower one is a loss.
    """
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)}, the file has {list(theirs.shape)}"
    if ours.dtype.itemsize < theirs.dtype.itemsize:
        return f"stored as {ours.dtype}, the file has {theirs.dtype}"
    if not is_finite(ours).all():
        return "has NaN or infinite values"
    # bfloat16 and float16 are equally wide and hold different numbers.
    both = ours.dtype if ours.dtype == theirs.dtype or ours.itemsize > theirs.itemsize else np.dtype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        unequal = _bits(ours.astype(both)) != _bits(theirs.astype(both))
    if not unequal.any():
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(unequal.argmax()), unequal.shape))
    share = f"{int(unequal.sum()):,} of {unequal.size:,} elements differ"
    return f"{share}, first at {list(at)}: {_value(ours[at])}, the file has {_value(theirs[at])}"


def is_finite(array: np.ndarray) -> np.ndarray:
    """Where an array of any dtype has numbers."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.isfinite(array.astype(np.float32))


def equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """`difference` finds none; most tensors that differ are seen to at a few elements."""
    if ours.shape != theirs.shape:
        return False
    few = sampled(ours)
    return not difference(ours[few], theirs[few]) and not difference(ours, theirs)


def sampled(array: np.ndarray) -> tuple[slice, ...]:
    """An index of a few elements spread over all axes."""
    return tuple(slice(None, None, max(1, length // SAMPLED)) for length in array.shape)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _value(value: Any) -> str:
    return f"{float(value):.6g}"


# -- One parameter ---------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterSite(Site):
    """A parameter that differs from the file's tensor of its name."""

    file: Mapping[str, np.ndarray]
    """All tensors of the file it was compared with, under our names."""

    @property
    def name(self) -> str:
        """The parameter's name, e.g. `layers.0.attn.q.kernel`."""
        return f"{self.finding.tap}.{self.finding.op}"

    @property
    def ours(self) -> np.ndarray | None:
        """The candidate's, if it has it."""
        array = self.candidate.stored.get(self.name)
        return None if array is None else np.asarray(array)

    @property
    def theirs(self) -> np.ndarray | None:
        """The file's, if it has it."""
        return self.file.get(self.name)

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`; `error` is the relative distance of the values."""
        words = problem(candidate, self.file, self.name, self.finding.where)
        ours = candidate.stored.get(self.name)
        error = 0.0
        if words:
            missing = ours is None or self.theirs is None
            error = float("inf") if missing else _distance(np.asarray(ours), self.file[self.name])
        return replace(_finding(self.name, self.finding.where, words), error=error)

    def residual(self) -> Residual | None:
        """See `Site.residual`."""
        ours, theirs = self.ours, self.theirs
        if ours is None or theirs is None:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            return residual.describe(self.name, ours, theirs)

    def substitute(self) -> Candidate | None:
        """The candidate with the file's tensor, or without one that the file lacks."""
        if self.theirs is not None:
            return with_parameters(self.candidate, {self.name: self.theirs})
        return without(self.candidate, self.name)


def site(comparison: Comparison, finding: Finding) -> ParameterSite:
    """The parameter of a finding, beside the file it was compared with."""
    place = comparison.source if finding.where == "reference" else comparison.export
    assert place is not None
    made = ParameterSite(comparison, NAME, finding, tensors(place))
    return replace(made, finding=replace(finding, error=made.measure(comparison.candidate).error))


def of_module(comparison: Comparison, module: str) -> list[ParameterSite]:
    """The wrong parameters of one module, for rungs that compare what is computed with them."""
    place = comparison.source or comparison.export
    if place is None:
        return []
    label = "reference" if comparison.source else "export"
    found = compare(comparison.candidate, tensors(place), label)
    return [site(comparison, finding) for finding in found if not finding.ok and finding.tap == module]


def with_parameters(candidate: Candidate, parameters: Mapping[str, Any]) -> Candidate:
    """The candidate with other values for some of its parameters."""
    return replace(candidate, stored={**candidate.stored, **parameters})


def without(candidate: Candidate, *names: str) -> Candidate:
    """The candidate without some of its parameters."""
    return replace(candidate, stored={name: array for name, array in candidate.stored.items() if name not in names})


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    squares = np.zeros(2)
    for a, b in _pieces(ours, theirs):
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.square(a - b).sum()), float(np.square(b).sum())
    distance, norm = (float(value) ** 0.5 for value in squares)
    if not np.isfinite(distance):
        return float("inf")
    return distance / norm if norm else distance


def _pieces(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both in float64, a bounded number of rows at once."""
    rows = max(1, noise.CHUNK // max(1, ours[:1].size)) if ours.ndim else 1
    for start in range(0, len(ours) if ours.ndim else 0, rows):
        part = slice(start, start + rows)
        # A signalling NaN, as swapped bytes may make one, is no reason to stop.
        with np.errstate(invalid="ignore"):
            pair = ours[part].astype(np.float64), theirs[part].astype(np.float64)
        yield pair
