"""`bisect`: the ladder, and for every difference a search for the change that undoes it."""

import argparse
from typing import Any

from oracle.verbs import arguments as shared
from oracle.verbs import compare


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("bisect", help="compare, and prove the cause of a difference")
    shared.add_comparison(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code is that of the model as it is, not as repaired."""
    shared.check_comparison(arguments)
    return compare.carry_out(arguments, diagnose=True)
