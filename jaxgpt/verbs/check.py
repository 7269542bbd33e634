"""`jaxgpt check`."""

from typing import TYPE_CHECKING

from jaxgpt.settings import CheckSettings
from jaxgpt.verbs.output import Output

if TYPE_CHECKING:
    from jaxgpt.checks.report import CheckLine


def check(settings: CheckSettings, output: Output) -> int:
    """Print each line as it is known; exit code 1 if one failed."""
    from jaxgpt import check as checking

    def report(line: "CheckLine") -> None:
        output.say(str(line))

    found = checking.check(
        settings.directory, all=settings.all, memorize=settings.memorize, device=settings.device, report=report
    )
    if output.json:
        output.result(found.to_dict())
    else:
        output.say("PASS" if found.passed else f"FAIL: {found.failures[0].name}")
    return found.exit_code
