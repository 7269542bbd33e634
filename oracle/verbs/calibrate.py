"""`calibrate`: measure the noise of clean runs and store the limits."""

import argparse
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from oracle import output_file
from oracle.verbs import arguments as shared


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("calibrate", help="measure clean runs and store the limits")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write, by default the oracle's own")
    parser.add_argument("--quick", action="store_true", help="few runs and wider limits, in two or three minutes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code.

    Raises:
        InputError: torch is missing, or the file cannot be where it was asked for.
    """
    shared.require_torch()
    shared.require_parent("--out", arguments.out)
    if arguments.out is not None and output_file.in_place(arguments.out):
        raise InputError(f"--out: {arguments.out} is a device, a pipe or a stream; name a file")
    if arguments.quick and arguments.out is None:
        raise InputError("--quick needs --out FILE: the oracle's own limits come from the full plan")
    from oracle import noise
    from oracle.calibrate import calibrate

    for line in calibrate(arguments.out or noise.CALIBRATION, quick=arguments.quick):
        print(line, flush=True)
    return 0
