"""`calibrate`: measure the noise of clean runs and store the limits."""

import argparse
from typing import Any

from oracle.verbs import arguments as shared


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("calibrate", help="measure clean runs and store the limits")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    shared.require_torch()
    from oracle.calibrate import calibrate

    for line in calibrate():
        print(line, flush=True)
    return 0
