"""`diff`: where two traces part; the second may be a checkpoint, recorded now on the first one's inputs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError
from oracle.verbs import arguments as shared

if TYPE_CHECKING:
    from oracle.traces.trace import Trace

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser("diff", help="compare two traces; needs neither JAX nor torch")
    parser.add_argument("a", type=Path, metavar="A", help="the trace that is right")
    parser.add_argument(
        "b", type=Path, metavar="B", help="the trace in doubt, or a jaxgpt checkpoint to run on A's inputs"
    )
    parser.add_argument("--map", type=Path, metavar="FILE", help="which tap of A is which of B: lines `a = b`, or JSON")
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument("--truth", type=Path, metavar="T", help="a float64 trace of A: measures A's own noise")
    measure.add_argument("--noise", type=Path, metavar="N", help="another trace of A: measures how far it varies")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a checkpoint; by default that of A")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--all", action="store_true", help="print every tap")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    shared.require_parent("--json", arguments.json)
    read = {"A": arguments.a, "B": arguments.b, "--truth": arguments.truth, "--noise": arguments.noise}
    shared.require_distinct({"--json": arguments.json}, {**read, "--map": arguments.map})
    from oracle.traces import name_map, text, trace_file
    from oracle.traces.difference import diff

    rules = name_map.load(arguments.map) if arguments.map is not None else []
    a = trace_file.load(arguments.a)
    b = _recorded(arguments.b, a, arguments.dtype) if arguments.b.is_dir() else _loaded(arguments.b, arguments.dtype)
    others = [None if path is None else trace_file.load(path) for path in (arguments.truth, arguments.noise)]
    difference = diff(a, b, rules, truth=others[0], repetition=others[1])
    if arguments.json is not None:
        shared.write_json(arguments.json, difference.to_dict())
    print("\n".join(text.lines(difference, everything=arguments.all)))
    return EXIT_CODES[difference.report.verdict]


def _loaded(path: Path, dtype: str | None) -> "Trace":
    from oracle.traces import trace_file

    if dtype is not None:
        raise InputError(f"--dtype is for a checkpoint; {path} is a recorded trace and has its own")
    return trace_file.load(path)


def _recorded(directory: Path, a: "Trace", dtype: str | None) -> "Trace":
    """Today's model on the inputs of a stored trace."""
    shared.require_jax(f"{directory} is a checkpoint, and running it")
    from oracle.traces import checkpoints
    from oracle.traces.recorder import selected

    absent = [name for name in checkpoints.INPUTS if name not in a.inputs]
    if absent:
        raise InputError(f"A has no input {absent[0]}, so {directory} cannot be run on its inputs; record A again")
    stored = a.environment.get("dtype", "")
    dtype = dtype or (stored if stored in checkpoints.DTYPES else "float32")
    inputs = {name: a.inputs[name] for name in checkpoints.INPUTS}
    trace = checkpoints.record_checkpoint(directory, inputs, dtype)
    return selected(trace, a.environment.get("include"), a.environment.get("exclude"))
