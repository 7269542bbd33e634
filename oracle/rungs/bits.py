"""Rung bits: every parameter against the Hugging Face files, element by element.

The files are read and named independently of the product (`oracle.folder`). Both
the source folder, if there is one, and the candidate's own export are compared, so
import and export are each checked by themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import weights
from oracle import folder, residual
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import Finding, Residual, RungResult
from oracle.site import Site

NAME = "bits"


def run(candidate: Candidate, export: Path | None, source: Path | None) -> RungResult:
    """Compare with `source` first (where a wrong parameter comes from), then with the `export`."""
    findings: list[Finding] = []
    for place, label in ((source, "reference"), (export, "export")):
        if place is not None:
            findings += compare(candidate, folder.parameters(folder.read(place)), label)
    equal = sum(finding.ok for finding in findings)
    return RungResult(
        NAME, findings, f"{equal} of {len(findings)} comparisons bit for bit against {_places(export, source)}"
    )


def _places(export: Path | None, source: Path | None) -> str:
    if source is None:
        return "the export only (no --reference)"
    return "the reference and the export" if export else "the reference"


def compare(candidate: Candidate, file: Mapping[str, np.ndarray], label: str) -> Iterator[Finding]:
    """One finding per parameter, in execution order, then one per tensor that only the file has."""
    file = dict(file)
    if candidate.config.tie_word_embeddings and "head.weight" in file:
        yield _finding("head.weight", label, difference(file["embed.tokens.weight"], file.pop("head.weight")))
    expected = [parameter.name for parameter in weights.parameters(candidate.config)]
    for name in [*expected, *sorted(candidate.stored.keys() - set(expected))]:
        ours, theirs = candidate.stored.get(name), file.pop(name, None)
        if ours is None:
            problem = "the candidate lacks it"
        else:
            problem = f"the {label} lacks it" if theirs is None else difference(np.asarray(ours), theirs)
        yield _finding(name, label, problem)
    for name in sorted(file):
        yield _finding(name, label, f"only the {label} has it")


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
    if not np.isfinite(ours.astype(np.float32)).all():
        return "has NaN or infinite values"
    # bfloat16 and float16 are equally wide and hold different numbers.
    both = ours.dtype if ours.dtype == theirs.dtype or ours.itemsize > theirs.itemsize else np.dtype(np.float32)
    unequal = _bits(ours.astype(both)) != _bits(theirs.astype(both))
    if not unequal.any():
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(unequal.argmax()), unequal.shape))
    share = f"{int(unequal.sum()):,} of {unequal.size:,} elements differ"
    return f"{share}, first at {list(at)}: {_value(ours[at])}, the file has {_value(theirs[at])}"


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

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`; `error` is the relative distance of the values."""
        ours, theirs = candidate.stored.get(self.name), self.file.get(self.name)
        if ours is None or theirs is None:
            return self.finding
        ours = np.asarray(ours)
        measured = _finding(self.name, self.finding.where, difference(ours, theirs))
        return replace(measured, error=_distance(ours, theirs))

    def residual(self) -> Residual | None:
        """See `Site.residual`."""
        ours, theirs = self.candidate.stored.get(self.name), self.file.get(self.name)
        return None if ours is None or theirs is None else residual.describe(self.name, np.asarray(ours), theirs)

    def substitute(self) -> Candidate | None:
        """The candidate with the file's tensor."""
        theirs = self.file.get(self.name)
        return None if theirs is None else with_parameters(self.candidate, {self.name: theirs})


def site(comparison: Comparison, finding: Finding) -> Site:
    """The parameter of a finding, beside the file it was compared with."""
    place = comparison.source if finding.where == "reference" else comparison.export
    assert place is not None
    file = folder.parameters(folder.read(place))
    made = ParameterSite(comparison, NAME, finding, file)
    return replace(made, finding=replace(finding, error=made.measure(comparison.candidate).error))


def with_parameters(candidate: Candidate, parameters: Mapping[str, Any]) -> Candidate:
    """The candidate with other values for some of its parameters."""
    return replace(candidate, stored={**candidate.stored, **parameters})


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not np.isfinite(a).all():
        return float("inf")
    norm = float(np.square(b).sum()) ** 0.5
    distance = float(np.square(a - b).sum()) ** 0.5
    return distance / norm if norm else distance
