"""`compare`: the ladder, once."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxgpt.errors import InputError
from oracle.verbs import arguments as shared

OWN_EXPORT = "its own export"


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("compare", help="compare a checkpoint with the reference")
    shared.add_comparison(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    shared.check_comparison(arguments)
    return carry_out(arguments, diagnose=False)


def carry_out(arguments: argparse.Namespace, *, diagnose: bool) -> int:
    """Compare, and look for the cause if asked to; print and write the report.

    Raises:
        InputError: `--plant` names no class, or more than one, or one that this comparison cannot show.
    """
    from jaxgpt import device
    from oracle import exposure, ladder, subject
    from oracle.faults import planting
    from oracle.reports import page, terminal
    from oracle.reports.outcome import Outcome

    start = time.perf_counter()
    fault = _planted(arguments.plant or [])
    planted = {"plant": planting.planter(fault)} if fault else {}
    device.keep_programs()
    answer = subject.compare(
        arguments.checkpoint,
        arguments.reference,
        arguments.dtype,
        shared.calibration(arguments),
        everything=arguments.all,
        seed=arguments.seed,
        diagnose=diagnose,
        progress=shared.progress,
        **planted,
    )
    answer = exposure.with_causes(answer)
    source = arguments.reference
    sides = {"checkpoint": str(arguments.checkpoint), "reference": str(source) if source else OWN_EXPORT}
    answer = replace(answer, environment={**sides, **answer.environment, **({"planted": fault} if planted else {})})
    print("\n".join(terminal.lines(answer)), flush=True)
    if arguments.json is not None:
        shared.write_json(arguments.json, answer.to_dict())
    if arguments.html is not None:
        shared.write_text(arguments.html, page.render(answer))
    name = f"{arguments.checkpoint.name} {arguments.dtype}"
    outcome = Outcome(name, answer, time.perf_counter() - start, rungs=tuple(ladder.LADDER))
    shared.write_ci(arguments, [outcome])
    return terminal.exit_code(answer)


def _planted(names: Sequence[str]) -> str:
    """The one class to be planted, or nothing."""
    from oracle.faults import planting

    if len(names) > 1:
        raise InputError(f"--plant was given {len(names)} times; one fault is planted at a time: give it once")
    return planting.known(names[0]) if names else ""
