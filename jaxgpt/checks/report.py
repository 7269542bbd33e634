"""What a check says: one line with a status and, for a failure, its cause."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["INFO", "PASS", "FAIL", "TIE", "SKIP"]


@dataclass(frozen=True)
class CheckLine:
    """One line of the report."""

    name: str
    """The check, or the fact."""
    status: Status
    """TIE: two paths differ by no more than rounding does, at a near-tie of two ids."""
    detail: str
    """What was measured; the cause of a failure; why something was skipped."""

    def __str__(self) -> str:
        return f"{self.status} {self.name}: {self.detail}"


@dataclass(frozen=True)
class CheckReport:
    """All lines of a run, in order; after the first failure there are more only if asked for."""

    lines: tuple[CheckLine, ...]

    @property
    def failures(self) -> tuple[CheckLine, ...]:
        """The lines that failed."""
        return tuple(line for line in self.lines if line.status == "FAIL")

    @property
    def passed(self) -> bool:
        """Nothing failed; a TIE is not a failure."""
        return not self.failures

    @property
    def exit_code(self) -> int:
        """0 if nothing failed, else 1."""
        return 0 if self.passed else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON: `passed`, the first failure's line as `cause`, and every line."""
        cause = str(self.failures[0]) if self.failures else None
        return {"passed": self.passed, "cause": cause, "lines": [asdict(line) for line in self.lines]}


def judged(name: str, problems: Iterable[str], detail: str) -> CheckLine:
    """FAIL with the first problem, else PASS with the detail; problems are looked for no further than the first."""
    problem = next(iter(problems), None)
    return CheckLine(name, "PASS", detail) if problem is None else CheckLine(name, "FAIL", problem)


def token(tokenizer: Any, id: int) -> str:
    """`17 ' the'`, or the bare id of a model without a tokenizer."""
    return f"{id} {tokenizer.token_name(id)}" if tokenizer else str(id)
