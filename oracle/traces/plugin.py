"""The pytest plugin: record a model in a test, and hold it to a recording stored beside the test.

It is loaded into every pytest run of an environment that has this package, and so
imports nothing but pytest until a fixture is used.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from oracle.traces.trace import Trace

FOLDER = "traces"
"""Beside the test's file."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--oracle-update`."""
    group = parser.getgroup("oracle")
    group.addoption("--oracle-update", action="store_true", help="write the traces that oracle_baseline compares with")


@pytest.fixture
def oracle_trace() -> "Callable[..., Trace]":
    """`oracle_trace(model, *args, **kwargs)`: the trace of a torch or Flax module, or of a function returning taps."""
    from oracle.traces.recorder import record_any

    return record_any


@pytest.fixture
def oracle_baseline(request: pytest.FixtureRequest) -> "Callable[..., None]":
    """`oracle_baseline(trace, name="")`: fail unless the trace agrees with the one stored beside the test.

    The file is `traces/<module>.<test>[.<name>].trace`; `pytest --oracle-update` writes
    it. `rules=` is a map file, `truth=` the file of a float64 trace that measures the noise.
    """

    def compare(trace: "Trace", name: str = "", *, rules: Path | None = None, truth: Path | None = None) -> None:
        path = _path(request, name)
        if request.config.getoption("--oracle-update"):
            _update(trace, path)
        else:
            _compare(trace, path, rules, truth)

    return compare


def _path(request: pytest.FixtureRequest, name: str) -> Path:
    parts = [request.path.stem, request.node.name, *([name] if name else [])]
    return request.path.parent / FOLDER / (re.sub(r"[^\w.=-]+", "_", ".".join(parts)) + ".trace")


def _update(trace: "Trace", path: Path) -> None:
    from oracle.traces.trace_file import save

    path.parent.mkdir(exist_ok=True)
    save(trace, path)


def _compare(trace: "Trace", path: Path, rules: Path | None, truth: Path | None) -> None:
    from oracle.traces import name_map, text
    from oracle.traces.difference import diff
    from oracle.traces.trace_file import load

    if not path.exists():
        pytest.fail(f"there is no {path}; write it with pytest --oracle-update", pytrace=False)
    table = name_map.load(rules) if rules is not None else []
    difference = diff(load(path), trace, table, truth=load(truth) if truth is not None else None)
    if difference.report.verdict != "pass":
        pytest.fail(f"{path.name} against now:\n" + "\n".join(text.lines(difference)), pytrace=False)
