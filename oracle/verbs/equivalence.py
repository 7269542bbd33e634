"""`equivalence`: every family and dtype, and faults that must be found."""

import argparse
from pathlib import Path
from typing import Any

from oracle.verbs import arguments as shared


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("equivalence", help="every family and dtype, and planted faults")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON reports")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    shared.require_torch()
    from oracle.equivalence import show

    return show(arguments.out)
