"""`faults`: the measured matrix of the fault catalogue."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxgpt.errors import InputError
from oracle.reports import wording
from oracle.verbs import arguments as given

PAIRS, CLEAN = 50, 1000


def add(verbs: Any) -> None:
    """Add the parser."""
    parser: argparse.ArgumentParser = verbs.add_parser("faults", help="plant every known fault and count what is found")
    parser.add_argument("--list", action="store_true", help="name every class and what it does; plant nothing")
    parser.add_argument("--out", type=Path, default=Path("build/faults"), help="where results are kept and go on from")
    parser.add_argument("--sample", type=int, metavar="N", help="plant N mutants of the catalogue only")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help="double faults")
    parser.add_argument("--clean", type=int, default=CLEAN, metavar="N", help="runs of true models")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    parser.add_argument("--only", default="", metavar="CLASS", help="one class of the catalogue")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes, of one core each")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure what is not measured yet, write the tables; 1 if a target is missed. With `--list`, names alone.

    Raises:
        InputError: torch is missing, an argument makes no sense, or `--out` cannot be made.
    """
    given.require_torch()
    if arguments.list:
        from oracle.faults import planting

        print("\n".join(planting.listed()))
        return 0
    _check(arguments)
    from oracle.faults import figures, matrix

    if arguments.only and arguments.only not in figures.classes():
        names = ", ".join(wording.quoted(figures.classes()))
        raise InputError(f"--only: the catalogue has no class {arguments.only!r}; it has {names}")
    options = {"sample": arguments.sample, "pairs": arguments.pairs, "runs": arguments.clean}
    chosen = matrix.plan(**options, seed=arguments.seed, only=arguments.only)
    records = matrix.measure(chosen, arguments.out, arguments.workers, _progress)
    return _write(arguments.out, records, chosen.skipped_pairs)


def _check(arguments: argparse.Namespace) -> None:
    least = {"sample": 1, "pairs": 0, "clean": 0, "seed": 0, "workers": 1}
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name} must be ≥ {smallest}, got {value}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {arguments.out}: {error.strerror}") from error


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(out: Path, records: list[dict[str, Any]], skipped: Any) -> int:
    import datetime
    import os
    import platform

    from oracle.faults import figures
    from oracle.rungs import environment

    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
    measured = environment.versions() | machine
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    given.write_text(out / "faults.md", figures.markdown(records, skipped, measured, date))
    given.write_json(out / "faults.json", figures.to_dict(records, skipped, measured, date))
    results = figures.figures(records)
    for figure in results:
        print(figure.row())
    print(f"tables in {out / 'faults.md'}")
    return 0 if all(figure.ok for figure in results) else 1
