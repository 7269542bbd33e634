"""`python -m oracle`: is this JAX model the model its weights came from, and if not, where and why not?

Exit codes: 0 pass, 1 fail, 2 bad input or usage, 3 inconclusive, 4 the oracle itself broke, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxgpt.errors import InputError
from oracle.results import Inconclusive

VERBS = ("compare", "bisect", "calibrate", "equivalence", "faults", "report", "record", "diff")
"""One module each in `oracle.verbs`; they import JAX and torch only when they run."""
BAD_INPUT, INCONCLUSIVE, BROKEN, INTERRUPTED, READER_GONE = 2, 3, 4, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m oracle", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an unexpected error")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for name in VERBS:
        importlib.import_module(f"oracle.verbs.{name}").add(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed)
    except InputError as error:
        print(f"oracle: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("oracle: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has gone; flushing at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except Inconclusive as error:
        print(f"INCONCLUSIVE. {error}.")
        return INCONCLUSIVE
    except SystemExit:
        raise
    except BaseException as error:  # Rust code panics with what is no Exception; Python would exit with 1 then: fail
        if debug:
            traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        print(f"oracle: broke with {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
        return BROKEN


if __name__ == "__main__":
    sys.exit(main())
