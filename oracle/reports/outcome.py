"""One comparison of several: its name, its report, and whether it answered as it must."""

from collections.abc import Sequence
from dataclasses import dataclass

from oracle.reports import terminal
from oracle.results import Report


@dataclass(frozen=True)
class Outcome:
    """What a CI system shows one line of."""

    name: str
    report: Report
    seconds: float = 0.0
    planted: bool = False
    """A fault was planted, so that the right answer is not `pass`."""
    wrong: str = ""
    """For a planted fault: how the answer differs from the right one; empty if it does not."""
    rungs: Sequence[str] = ()
    """All that were to be climbed, in order."""

    @property
    def ok(self) -> bool:
        """It answered as it must: a comparison that decides nothing did not."""
        return not self.wrong if self.planted else self.report.verdict == "pass"

    @property
    def not_reached(self) -> list[str]:
        """Rungs behind the one that decided."""
        climbed = {rung.name for rung in self.report.rungs}
        return [name for name in self.rungs if name not in climbed]

    @property
    def title(self) -> str:
        """The name, and with it the fault that a user planted: a failure is no news of the model then."""
        return f"{self.name}{self._planted}"

    @property
    def message(self) -> str:
        """What happened, in one line."""
        if self.wrong:
            return self.wrong
        causes = [line for line in terminal.causes(self.report) if line.startswith("Cause")]
        return " ".join([terminal.verdict(self.report), *causes]) + self._planted

    @property
    def _planted(self) -> str:
        fault = self.report.environment.get("planted")
        return f" (planted: {fault})" if fault else ""
