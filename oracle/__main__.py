"""`python -m oracle`: is this JAX model the model its weights came from, and if not, where and why not?

Exit codes: 0 pass, 1 fail, 2 bad input or usage, 3 inconclusive, 4 the oracle itself broke, 130 interrupted.
"""

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxgpt.errors import InputError
from oracle.reports import wording
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
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("oracle: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has gone; flushing at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except Inconclusive as error:
        print(f"INCONCLUSIVE. {wording.sentence(one_line(str(error)))}")
        return INCONCLUSIVE
    except SystemExit:
        raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _refuse(f"{error.filename}: {error.strerror}; give a shorter path")
        if isinstance(error, PermissionError):
            return _refuse(f"{error.filename}: permission denied; give a path that this user may read and write")
        return _broke(error, debug)
    except BaseException as error:  # Rust code panics with what is no Exception; Python would exit with 1 then: fail
        return _broke(error, debug)


def _refuse(message: str) -> int:
    print(f"oracle: {one_line(message)}", file=sys.stderr)
    return BAD_INPUT


def _broke(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    reason = one_line((str(error).splitlines() or [""])[0])
    print(f"oracle: broke with {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
    return BROKEN


LONGEST = 2000
"""Characters of a message; of a longer one the middle is left out."""


def one_line(message: str) -> str:
    """What a user or a file gave may be in it: nothing in it moves the cursor or fills the screen."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in message)


if __name__ == "__main__":
    sys.exit(main())
