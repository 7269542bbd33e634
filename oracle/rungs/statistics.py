"""Rung statistics: can a parameter of this kind look like that?

Bits say whether the parameters are the file's; this says whether what the file holds
can be a model's at all. The limits are what no real or fresh model comes near, so
that an alarm is never a matter of taste:

- Norm weights: ones when fresh; GPT-2's reach about 20, Qwen2's 17.4, Llama's first
  layers lie around 0.01 with many smaller ones. Zeros would silence the model.
- Biases: zero when fresh; Qwen2's key and query biases reach hundreds.
- Kernels: standard deviation 0.02 when fresh, trained 0.003 to 0.2 with single values
  beyond 10; small test models 1.
- Embeddings: Llama's standard deviation is 0.001 to 0.02, GPT-2's 0.14, others near 1.

A matrix has small values among larger ones whatever it learnt. Bits of bfloat16 read
as float16 have none: the exponent's upper bits land on 2⁻¹ to 2¹ for every weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle import folder
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.results import Finding, RungResult
from oracle.site import Site

NAME = "statistics"

LARGEST = 1e4
"""Of any parameter's magnitude: twenty times the largest bias known."""
NORM_WEIGHT = (1e-4, 1e3)
"""Of the root mean square."""
MATRIX = (1e-6, 1e2)
"""Of the root mean square of a kernel or embedding: float16 bits read as bfloat16 are at 1e-15."""
SMALL = 0.25
"""Values below this part of the root mean square: a fifth of a normal distribution."""
FEWEST_SMALL = 0.01
"""Bits read in the wrong dtype have a thousandth of them."""
MISREAD = (0.5, 4.0)
"""Root mean squares that bfloat16 bits read as float16 have; smaller matrices are left alone."""
ENOUGH = 256
"""Values of which shares mean something."""
REPEATED = {"kernel": 0.5, "embedding": 0.95}
"""Rows that repeat another: the share from which on it is a mistake. Dead neurons are
rows of zeros; rows of unused tokens and padding of the vocabulary may all be the same."""
COPY = "bit for bit the same as "
_CHUNK = 1 << 20
"""Elements handled at once in float64."""


def run(comparison: Comparison) -> RungResult:
    """One finding per stored parameter, in the candidate's order."""
    stored = comparison.candidate.stored
    found = {name: measure(np.asarray(array)) for name, array in stored.items()}
    problems = {name: judge(name, summary) for name, summary in found.items()}
    copies = copied({name: summary for name, summary in found.items() if not problems[name]})
    if copies and comparison.source is not None:
        # A model that was made by repeating layers has them in its own files too.
        copies = _unlike_the_source(copies, folder.parameters(folder.read(comparison.source)))
    for name, other in copies.items():
        problems[name] = f"{COPY}{other}"
    findings = [_finding(name, problem) for name, problem in problems.items()]
    odd = sum(not finding.ok for finding in findings)
    return RungResult(NAME, findings, f"{len(findings)} parameters, {odd} of which cannot be right")


def _finding(name: str, problem: str) -> Finding:
    module, _, leaf = name.rpartition(".")
    return Finding(tap=module, op=leaf, ok=not problem, problem=problem)


# -- Numbers ---------------------------------------------------------------------------


@dataclass
class Summary:
    """What one pass over a parameter finds; numbers are those of its finite values."""

    shape: tuple[int, ...]
    dtype: str
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    smallest: float = float("inf")
    largest: float = float("-inf")
    zeros: int = 0
    small: int = 0
    """Values that are less than `SMALL` times the root mean square."""
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """A hash of every row's bits."""
    columns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def size(self) -> int:
        """Values, those that are not finite included."""
        return int(np.prod(self.shape))

    @property
    def rms(self) -> float:
        """Root mean square."""
        return (self.squares / max(self.count, 1)) ** 0.5

    @property
    def mean(self) -> float:
        """Of the values."""
        return self.total / max(self.count, 1)

    @property
    def std(self) -> float:
        """Standard deviation."""
        return max(self.squares / max(self.count, 1) - self.mean**2, 0.0) ** 0.5

    @property
    def magnitude(self) -> float:
        """The largest."""
        return max(abs(self.smallest), abs(self.largest)) if self.count else 0.0

    def repeated(self, columns: bool = False) -> float:
        """The share of rows that are bit for bit another row."""
        hashes = self.columns if columns else self.rows
        return 1.0 - len(np.unique(hashes)) / max(len(hashes), 1)


def measure(array: np.ndarray) -> Summary:
    """The summary of a parameter, a block of rows at a time."""
    found = Summary(array.shape, str(array.dtype))
    for _, block in _blocks(array):
        # A signalling NaN, as swapped bytes may make one, is no reason to stop.
        with np.errstate(invalid="ignore"):
            values = block.astype(np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            found.count += values.size
            found.total += float(values.sum())
            found.squares += float(np.square(values).sum())
            found.smallest = min(found.smallest, float(values.min()))
            found.largest = max(found.largest, float(values.max()))
            found.zeros += int((values == 0).sum())
    if array.ndim == 2:
        found.rows, found.columns = _hashes(array)
        limit = SMALL * found.rms
        found.small = sum(int((np.abs(block.astype(np.float32)) < limit).sum()) for _, block in _blocks(array))
    return found


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows with the first row's number; the array is neither copied nor flattened."""
    rows = array if array.ndim == 2 else array.reshape(1, -1)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step]


def _hashes(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the bits of every row, and of every column, each times a random odd number: equal ones are equal."""
    rng = np.random.default_rng(0)
    by_row, by_column = (rng.integers(0, 1 << 63, size, dtype=np.uint64) * 2 + 1 for size in array.shape)
    rows, columns = np.zeros(array.shape[0], np.uint64), np.zeros(array.shape[1], np.uint64)
    for start, block in _blocks(array):
        bits = np.ascontiguousarray(block).view(f"u{array.dtype.itemsize}").astype(np.uint64)
        stop = start + len(block)
        rows[start:stop] = (bits * by_column).sum(axis=1, dtype=np.uint64)
        columns += (bits * by_row[start:stop, None]).sum(axis=0, dtype=np.uint64)
    return rows, columns


# -- Judgement -------------------------------------------------------------------------


def judge(name: str, found: Summary) -> str:
    """Why a parameter cannot be right; empty where nothing speaks against it."""
    if found.count < found.size:
        return f"{found.size - found.count:,} of {found.size:,} values are NaN or infinity"
    if found.magnitude > LARGEST:
        return f"has the value {_of_largest_magnitude(found):.3g}; expected magnitudes below {LARGEST:g}"
    if name.endswith("norm.weight") and not NORM_WEIGHT[0] <= found.rms <= NORM_WEIGHT[1]:
        low, high = NORM_WEIGHT
        return f"magnitude {found.rms:.3g} of norm weights; expected {low:g}–{high:g}"
    return _matrix(name, found) if len(found.shape) == 2 else ""


def _of_largest_magnitude(found: Summary) -> float:
    return found.largest if found.largest == found.magnitude else found.smallest


def _matrix(name: str, found: Summary) -> str:
    low, high = MATRIX
    kind = "a kernel" if name.endswith("kernel") else "an embedding"
    if found.size > 1 and found.smallest == found.largest:
        return "is zero everywhere" if found.largest == 0 else f"every value is the same, {found.largest:.3g}"
    if not low <= found.rms <= high:
        return f"std {found.std:.3g} of {kind}; expected {low:g}–{high:g}"
    if found.size >= ENOUGH and MISREAD[0] <= found.rms <= MISREAD[1] and found.small < FEWEST_SMALL * found.size:
        share = f"{found.small:,} of {found.size:,}"
        return f"std {found.std:.3g} with hardly a small value ({share}): as of bfloat16 bits read as float16"
    return _repetition(name, found)


def _repetition(name: str, found: Summary) -> str:
    limit = REPEATED["kernel" if name.endswith("kernel") else "embedding"]
    if found.repeated() > limit:
        return f"{found.repeated():.0%} of its {found.shape[0]:,} rows repeat another bit for bit"
    # Programs without grouped heads store the keys and values of a group once for each query head.
    grouped = name.endswith(("attn.k.kernel", "attn.v.kernel"))
    if name.endswith("kernel") and not grouped and found.repeated(columns=True) > limit:
        return f"{found.repeated(columns=True):.0%} of its {found.shape[1]:,} columns repeat another bit for bit"
    return ""


def copied(found: Mapping[str, Summary]) -> dict[str, str]:
    """Matrices that are an earlier one bit for bit, with its name; an untied head may repeat the embedding."""
    first: dict[tuple[Any, ...], str] = {}
    copies: dict[str, str] = {}
    for name, summary in found.items():
        if len(summary.shape) == 2 and summary.size > 1:
            key = (summary.shape, summary.dtype, summary.rows.tobytes())
            other = first.setdefault(key, name)
            if other != name and (other, name) != ("embed.tokens.weight", "head.weight"):
                copies[name] = other
    return copies


def _unlike_the_source(copies: Mapping[str, str], source: Mapping[str, np.ndarray]) -> dict[str, str]:
    def same(a: str, b: str) -> bool:
        return a in source and b in source and np.array_equal(source[a], source[b])

    return {name: other for name, other in copies.items() if not same(name, other)}


# -- One parameter ---------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticsSite(Site):
    """A parameter that cannot be right."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        return f"{self.finding.tap}.{self.finding.op}"

    def measure(self, candidate: Candidate) -> Finding:
        """See `Site.measure`; of a copy it cannot be told alone."""
        found = measure(np.asarray(candidate.stored[self.name]))
        problem = judge(self.name, found)
        return self.finding if not problem and COPY in self.finding.problem else _finding(self.name, problem)


def site(comparison: Comparison, finding: Finding) -> Site:
    """The parameter of a finding."""
    return StatisticsSite(comparison, NAME, finding)
