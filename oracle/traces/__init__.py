"""Traces: every intermediate value of one run in one file, recorded in any framework, compared without one.

`record`, `record_torch`, `record_flax` make a `Trace`; `save` and `load` keep it in a
file; `diff` says where two of them part. Names are loaded when first used: importing
this package costs nothing, and comparing needs NumPy alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oracle.traces.difference import diff as diff
    from oracle.traces.flax_calls import record_flax as record_flax
    from oracle.traces.recorder import record as record
    from oracle.traces.torch_hooks import record_torch as record_torch
    from oracle.traces.trace import Trace as Trace
    from oracle.traces.trace_file import load as load
    from oracle.traces.trace_file import save as save

__all__ = ["Trace", "diff", "load", "record", "record_flax", "record_torch", "save"]

_HOME = {
    "Trace": "trace",
    "diff": "difference",
    "load": "trace_file",
    "record": "recorder",
    "record_flax": "flax_calls",
    "record_torch": "torch_hooks",
    "save": "trace_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oracle.traces' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"oracle.traces.{_HOME[name]}"), name)
