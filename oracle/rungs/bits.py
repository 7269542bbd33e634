"""Rung bits: every parameter against the Hugging Face files, element by element.

The files are read and named independently of the product (`oracle.folder`). Both
the source folder, if there is one, and the candidate's own export are compared, so
import and export are each checked by themselves.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import weights
from oracle import folder
from oracle.candidate import Candidate
from oracle.results import Finding, RungResult

NAME = "bits"


def run(candidate: Candidate, export: Path, source: Path | None) -> RungResult:
    """Compare with `source` first (where a wrong parameter comes from), then with the `export`."""
    findings: list[Finding] = []
    for place, label in ((source, "reference"), (export, "export")):
        if place is not None:
            findings += compare(candidate, folder.parameters(folder.read(place)), label)
    equal = sum(finding.ok for finding in findings)
    against = "the reference and the export" if source else "the export only (no --reference)"
    return RungResult(NAME, findings, f"{equal} of {len(findings)} comparisons bit for bit against {against}")


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
