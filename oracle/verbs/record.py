"""`record`: every intermediate value of one run in one file."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError
from oracle.verbs import arguments as shared

if TYPE_CHECKING:
    from oracle.traces.trace import Trace


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("record", help="write a run's intermediate values to a file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", type=Path, nargs="?", help="a jaxgpt run folder or one of its steps")
    source.add_argument("--reference", type=Path, metavar="HF_DIR", help="record the torch reference on this folder")
    source.add_argument("--callable", metavar="MODULE:FUNCTION", help="record what this function returns")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        help="compute dtype, by default float32; float64 for --reference only",
    )
    parser.add_argument(
        "--prompt-ids",
        action="append",
        metavar="N,N,…",
        help="ids of one row; again for each further row, all of one length; by default 2 × 32 random ids",
    )
    parser.add_argument("--include", metavar="REGEX", help="only taps in whose name this is found")
    parser.add_argument("--exclude", metavar="REGEX", help="no taps in whose name this is found")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    shared.require_parent("--out", arguments.out)
    from oracle.traces import trace_file
    from oracle.traces.recorder import selected

    trace = selected(_trace(arguments), arguments.include, arguments.exclude)
    trace_file.save(trace, arguments.out)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(trace.taps)} taps, {len(trace.inputs)} inputs, {size / 1e6:.2f} MB")
    for name, reason in list(trace.left_out.items())[:10]:
        print(f"  left out: {name} ({reason})")
    return 0


def _trace(arguments: argparse.Namespace) -> "Trace":
    if arguments.callable is not None:
        if arguments.prompt_ids is not None or arguments.dtype is not None:
            raise InputError("--prompt-ids and --dtype are for a checkpoint or --reference; the function has its own")
        return _called(arguments.callable)
    from oracle.traces import checkpoints

    rows = [_ids(row) for row in arguments.prompt_ids or ()]
    inputs = checkpoints.given(rows) if rows else None
    dtype = arguments.dtype or "float32"
    if arguments.reference is not None:
        shared.require_torch()
        return checkpoints.record_reference(arguments.reference, inputs, dtype)
    if dtype not in checkpoints.DTYPES:
        raise InputError("a checkpoint computes in float32 or bfloat16; record the float64 truth with --reference")
    return checkpoints.record_checkpoint(arguments.checkpoint, inputs, dtype)


def _ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--prompt-ids takes whole numbers between commas, got {text!r}") from None
    outside = [i for i in ids if abs(i) >= 2**31]
    if outside:
        raise InputError(f"--prompt-ids: token {outside[0]} is outside every vocabulary")
    return ids


def _called(name: str) -> "Trace":
    """What the function of the user's program returns: a trace, or taps."""
    from oracle.traces.recorder import record

    function = _function(name)
    try:
        return record(function)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} {_ended(error)}") from error


def _ended(error: BaseException) -> str:
    """How a user's program came to its end; leaving is no result either."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}) and returned nothing to record"
    return f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _function(name: str) -> Callable[[], Any]:
    module, colon, attribute = name.partition(":")
    if not colon or not module.strip(".") or module.startswith(".") or not attribute:
        raise InputError(f"--callable takes MODULE:FUNCTION, for example examples.model:trace, got {name!r}")
    # As `python -m` does: the user's program is where the user is.
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--callable cannot import {module}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"--callable cannot import {module}: it {_ended(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise InputError(f"{module} has no function {attribute}; --callable takes MODULE:FUNCTION")
    return function
