"""What several verbs share: the checkpoint and its reference, files to write, and whether torch is there."""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError
from oracle import output_file

if TYPE_CHECKING:
    from oracle.noise import Calibration
    from oracle.reports.outcome import Outcome


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, what to compare it with, and where the report goes."""
    parser.add_argument("checkpoint", type=Path, help="a run folder or one of its steps")
    parser.add_argument("--reference", type=Path, metavar="HF_DIR", help="the folder the weights came from")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="and here as one page for a browser")
    add_ci(parser)
    add_calibration(parser)
    parser.add_argument("--all", action="store_true", help="go on after the first broken rung")
    parser.add_argument("--seed", type=int, default=0, help="of the probe inputs")
    planted = "plant this mistake first, to see what is said of it (`faults --list` names them)"
    parser.add_argument("--plant", action="append", metavar="CLASS", help=planted)


def add_ci(parser: argparse.ArgumentParser) -> None:
    """What a CI system reads."""
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the answer as JUnit XML")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="append it as Markdown ($GITHUB_STEP_SUMMARY)")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Where the limits come from."""
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="limits from here, not those that are stored")


def calibration(arguments: argparse.Namespace) -> "Calibration":
    """The limits that were asked for.

    Raises:
        InputError: the file is no calibration.
        Inconclusive: none was named, and none is stored.
    """
    from oracle import noise

    return noise.load(arguments.calibration) if arguments.calibration else noise.stored_calibration()


def check_comparison(arguments: argparse.Namespace) -> None:
    """Before anything is loaded.

    Raises:
        InputError: torch is missing, or an argument no comparison can use.
    """
    require_parent("--json", arguments.json)
    require_parent("--html", arguments.html)
    check_ci(arguments)
    written = {f"--{name}": getattr(arguments, name) for name in ("json", "html", "junit", "summary")}
    require_distinct(written, {"--calibration": arguments.calibration})
    if arguments.seed < 0:
        raise InputError(f"--seed must be ≥ 0, got {arguments.seed}")
    require_torch()


def check_ci(arguments: argparse.Namespace) -> None:
    """Raises InputError where the files of `add_ci` cannot be."""
    require_parent("--junit", arguments.junit)
    require_parent("--summary", arguments.summary)


def require_torch() -> None:
    """Raises InputError, saying what to install, where there is no torch or one that cannot be imported."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("the oracle needs torch: pip install '.[oracle]'")
    try:
        importlib.import_module("torch")
    except Exception as error:
        # A library that is missing, or built for another machine, raises whatever it likes.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"torch is installed but cannot be imported: {reason}; install it anew") from error


def require_parent(option: str, path: Path | None) -> None:
    """Raises InputError where a file that was asked for cannot be written."""
    if path is not None:
        output_file.require(option, path)


def require_distinct(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """See `output_file.require_distinct`; paths by option, None where it was not given."""
    files = [{option: path for option, path in group.items() if path is not None} for group in (written, read)]
    output_file.require_distinct(*files)


def require_jax(what: str) -> None:
    """Raises InputError, saying what needs it, where there is no JAX."""
    if importlib.util.find_spec("jax") is None:
        raise InputError(f"{what} needs JAX: pip install .")


def progress(name: str) -> None:
    """Show on a terminal what is being done; nothing once it is over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{name} …" if name else "\r\033[K", end="", file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    """See `output_file.write_text`."""
    output_file.write_text(path, text)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """See `write_text`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_ci(arguments: argparse.Namespace, outcomes: Sequence["Outcome"]) -> None:
    """The files of `add_ci`, where they were asked for.

    Raises:
        InputError: a file cannot be written.
    """
    from oracle.reports import junit, summary

    if arguments.junit is not None:
        write_text(arguments.junit, junit.render(outcomes))
    if arguments.summary is not None:
        output_file.append(arguments.summary, summary.render(outcomes))
