"""`equivalence`: every family, shape and dtype, and faults that must be found."""

import argparse
import os
from pathlib import Path
from typing import Any

from oracle.verbs import arguments as shared


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("equivalence", help="every family and dtype, and planted faults")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the reports")
    shared.add_ci(parser)
    shared.add_calibration(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code. On GitHub the job's summary page gets the summary without being asked."""
    shared.require_torch()
    github = os.environ.get("GITHUB_STEP_SUMMARY")
    if arguments.summary is None and github:
        arguments.summary = Path(github)
    shared.check_ci(arguments)
    from oracle import equivalence

    outcomes = equivalence.show(arguments.out, arguments.calibration)
    shared.write_ci(arguments, outcomes)
    return equivalence.exit_code(outcomes)
