"""`python -m oracle`: compare a checkpoint with the reference, calibrate, or show equivalence.

Exit codes: 0 pass, 1 fail, 2 bad input or usage, 3 inconclusive, 4 the oracle itself broke.
"""

import argparse
import importlib.util
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxgpt.errors import InputError

BAD_INPUT, INCONCLUSIVE, BROKEN = 2, 3, 4


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m oracle", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an unexpected error")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    compare = verbs.add_parser("compare", help="compare a checkpoint with the PyTorch reference")
    compare.add_argument("checkpoint", type=Path, help="a run folder or one of its steps")
    compare.add_argument("--reference", type=Path, metavar="HF_DIR", help="the folder the weights came from")
    compare.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    compare.add_argument("--all", action="store_true", help="go on after the first broken rung")
    compare.add_argument("--seed", type=int, default=0, help="of the probe inputs")
    compare.set_defaults(run=_compare)
    calibrate = verbs.add_parser("calibrate", help="measure the noise of clean runs and store the limits")
    calibrate.set_defaults(run=_calibrate)
    equivalence = verbs.add_parser("equivalence", help="both families in fp32 and bf16, and faults that must be found")
    equivalence.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON reports")
    equivalence.set_defaults(run=_equivalence)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        parsed = _parser().parse_args(arguments)
        _require_torch()
        return parsed.run(parsed)
    except InputError as error:
        print(f"oracle: {error}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        from oracle.results import Inconclusive

        if isinstance(error, Inconclusive):
            print(f"INCONCLUSIVE. {error}.")
            return INCONCLUSIVE
        if debug:
            traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        print(f"oracle: broke with {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
        return BROKEN


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError("the oracle needs torch: pip install jaxgpt[oracle]")


def _compare(arguments: argparse.Namespace) -> int:
    from oracle import noise, report, subject

    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json: the folder {arguments.json.parent} does not exist; create it first")
    if arguments.seed < 0:
        raise InputError(f"--seed must be ≥ 0, got {arguments.seed}")
    answer = subject.compare(
        arguments.checkpoint,
        arguments.reference,
        arguments.dtype,
        noise.stored_calibration(),
        everything=arguments.all,
        seed=arguments.seed,
        progress=_progress,
    )
    if arguments.json is not None:
        write_json(arguments.json, answer.to_dict())
    print("\n".join(report.lines(answer)))
    return report.exit_code(answer)


def _progress(name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{name} …" if name else "\r\033[K", end="", file=sys.stderr, flush=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _calibrate(arguments: argparse.Namespace) -> int:
    from oracle.calibrate import calibrate

    for line in calibrate():
        print(line, flush=True)
    return 0


def _equivalence(arguments: argparse.Namespace) -> int:
    from oracle.equivalence import show

    return show(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
