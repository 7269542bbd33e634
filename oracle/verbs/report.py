"""`report`: a JSON report in its other forms, without the models, JAX or torch."""

import argparse
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from oracle.verbs import arguments as shared


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("report", help="show a JSON report as text or as a page")
    parser.add_argument("report", type=Path, metavar="REPORT.json", help="what `--json FILE` wrote")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one offline page")
    shared.add_ci(parser)
    parser.add_argument("--text", action="store_true", help="print it; so does no option at all")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code says that the report was shown, not what it says."""
    from oracle.reports import evidence, json_report, page, terminal
    from oracle.reports.outcome import Outcome

    shared.require_parent("--html", arguments.html)
    shared.check_ci(arguments)
    written = {"--html": arguments.html, "--junit": arguments.junit, "--summary": arguments.summary}
    shared.require_distinct(written, {"the report": arguments.report})
    try:
        report = json_report.read(arguments.report)
        rendered = page.render(report) if arguments.html is not None else ""
    except RecursionError:
        raise InputError(f"{arguments.report}: values nested too deeply; {json_report.REMEDY}") from None
    if arguments.html is not None:
        shared.write_text(arguments.html, rendered)
    seconds = sum(rung.seconds for rung in report.rungs)
    shared.write_ci(arguments, [Outcome(arguments.report.stem, report, seconds, rungs=tuple(evidence.ASKS))])
    if arguments.text or not (arguments.html or arguments.junit or arguments.summary):
        print("\n".join(terminal.lines(report)))
    return 0
