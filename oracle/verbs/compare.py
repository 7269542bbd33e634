"""`compare`: the ladder, once."""

import argparse
import time
from dataclasses import replace
from typing import Any

from oracle.verbs import arguments as shared


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
    """Compare, and look for the cause if asked to; print and write the report."""
    from oracle import ladder, subject
    from oracle.faults import planting
    from oracle.reports import page, terminal
    from oracle.reports.outcome import Outcome

    start = time.perf_counter()
    planted = {} if arguments.plant is None else {"plant": planting.planter(arguments.plant)}
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
    if planted:
        answer = replace(answer, environment={**answer.environment, "planted": arguments.plant})
    print("\n".join(terminal.lines(answer)), flush=True)
    if arguments.json is not None:
        shared.write_json(arguments.json, answer.to_dict())
    if arguments.html is not None:
        shared.write_text(arguments.html, page.render(answer))
    name = f"{arguments.checkpoint.name} {arguments.dtype}"
    outcome = Outcome(name, answer, time.perf_counter() - start, rungs=tuple(ladder.LADDER))
    shared.write_ci(arguments, [outcome])
    return terminal.exit_code(answer)
