"""Recording: whatever a program returns or calls becomes named numpy arrays, in execution order."""

import dataclasses
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxgpt.errors import InputError
from oracle.traces.trace import Trace

OUTPUT = "output"
"""The tap of what the outermost module returns."""
REDUCED = "reduced"
"""Value of `MATMULS` where float32 products may be rounded to fewer bits (TF32, bfloat16 passes)."""
MATMULS = "float32 matmuls"


def record(
    function: Callable[..., Any],
    *args: Any,
    inputs: Any = None,
    include: str | None = None,
    exclude: str | None = None,
    **kwargs: Any,
) -> Trace:
    """The trace of `function(*args, **kwargs)`, which returns its taps: a dict of arrays in execution order.

    Nested dicts, sequences and dataclasses become dotted names; a complex array becomes
    its `real` and `imag`. A function that jit compiled returns its dict sorted by name:
    then order is no longer that of execution.

    Args:
        function: anything; its arrays may be numpy's, JAX's or torch's.
        inputs: what to store as the run's inputs, likewise nested; two traces are
            compared only as far as these agree.
        include: keep only taps in whose name this regular expression is found.
        exclude: leave out taps in whose name this one is found.

    Raises:
        InputError: nothing was returned, or what was is no concrete array.
    """
    recorder = Recorder(include, exclude)
    taps = function(*args, **kwargs)
    if isinstance(taps, Trace):
        return taps
    if not isinstance(taps, Mapping):
        raise InputError(f"the recorded function returned {type(taps).__name__}, not a dict of arrays by tap name")
    for name, value in taps.items():
        recorder.add(str(name), value)
    return recorder.trace(flat(inputs), environment())


def selected(trace: Trace, include: str | None, exclude: str | None) -> Trace:
    """The same trace with fewer taps; what was asked for stays in its environment, so that a replay does the same."""
    recorder = Recorder(include, exclude)
    taps = {name: tap for name, tap in trace.taps.items() if recorder.wants(name)}
    left_out = {name: reason for name, reason in trace.left_out.items() if recorder.wants(name)}
    asked = {key: text for key, text in (("include", include), ("exclude", exclude)) if text is not None}
    return Trace(taps, trace.inputs, {**trace.environment, **asked}, left_out)


def record_any(runner: Any, *args: Any, **kwargs: Any) -> Trace:
    """`record_torch`, `record_flax` or `record`, whichever fits; the framework is not imported to find out."""
    owner = getattr(runner, "__self__", runner)
    torch, flax = sys.modules.get("torch"), sys.modules.get("flax")
    if torch is not None and isinstance(owner, torch.nn.Module):
        from oracle.traces.torch_hooks import record_torch

        return record_torch(runner, *args, **kwargs)
    if flax is not None and type(owner).__mro__ and _is_flax_module(owner):
        from oracle.traces.flax_calls import record_flax

        return record_flax(runner, *args, **kwargs)
    return record(runner, *args, **kwargs)


def _is_flax_module(value: Any) -> bool:
    from flax import linen, nnx

    return isinstance(value, linen.Module | nnx.Module)


class Recorder:
    """Collects taps in the order in which they are told."""

    def __init__(self, include: str | None = None, exclude: str | None = None):
        self._include, self._exclude = _pattern("include", include), _pattern("exclude", exclude)
        self._calls: dict[str, int] = {}
        self.taps: dict[str, np.ndarray] = {}
        self.left_out: dict[str, str] = {}

    def call(self, name: str, output: Any) -> str:
        """A module's output; from its second call on the name ends in `#2`, `#3`, …"""
        count = self._calls[name] = self._calls.get(name, 0) + 1
        numbered = name if count == 1 else f"{name}#{count}"
        self.add(numbered, output)
        return numbered

    def add(self, name: str, value: Any) -> None:
        """A value, nested or not."""
        for leaf, item in leaves(name, value):
            if not self.wants(leaf):
                continue
            array = as_array(leaf, item)
            if array is None:
                self.left_out[leaf] = f"a {type(item).__name__}, which is no array"
            elif array.dtype.kind == "c":
                self.taps |= {f"{leaf}.real": np.real(array).copy(), f"{leaf}.imag": np.imag(array).copy()}
            else:
                self.taps[leaf] = array

    def wants(self, name: str) -> bool:
        """Neither left out by `include` nor by `exclude`."""
        if self._include is not None and not self._include.search(name):
            return False
        return self._exclude is None or not self._exclude.search(name)

    def never_called(self, names: Iterator[str]) -> None:
        """Modules that did not run, or ran where they cannot be seen; some kernels bypass them."""
        for name in names:
            if name not in self._calls and self.wants(name):
                self.left_out[name] = "never called"

    def trace(self, inputs: Mapping[str, np.ndarray], environment: Mapping[str, str]) -> Trace:
        """What was collected."""
        return Trace(self.taps, inputs, environment, self.left_out)


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise InputError(f"{option}: {text!r} is no regular expression: {error}") from None


# -- Values ----------------------------------------------------------------------------


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of a nested value; None, an output that was not asked for, is nothing."""
    if value is None:
        return
    for key, item in _children(value):
        yield from leaves(f"{name}.{key}" if name else str(key), item)
    if not _is_nested(value):
        yield name, value


def _is_nested(value: Any) -> bool:
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Mapping | tuple | list) or is_dataclass


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(getattr(value, "_fields"), value, strict=True)  # noqa: B009 (a named tuple)
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif _is_nested(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def as_array(name: str, value: Any) -> np.ndarray | None:
    """A copy as numpy holds it; None for what is no array.

    Raises:
        InputError: a value that JAX is only tracing.
    """
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and isinstance(value, jax.core.Tracer):
        raise InputError(
            f"{name} has no value, JAX is only tracing it: record outside jit, vmap, scan, remat and grad "
            "(jax.disable_jit() switches jit and scan off)"
        )
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(name, value)
    if not isinstance(value, bool | int | float | complex) and not hasattr(value, "__array__"):
        return None
    try:
        array = np.array(value)
    except TypeError:  # a JAX random key is an array in name only
        return None
    return None if array.dtype.kind in "OSUMm" else array


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    import torch

    plain = tensor.detach()
    if plain.layout is not torch.strided or plain.is_quantized:
        raise InputError(f"{name} is a sparse or quantized tensor; exclude it, or record a dense copy")
    plain = plain.to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
    own = str(plain.dtype).removeprefix("torch.")
    if own.startswith(("bfloat", "float8")):  # numpy has none of its own
        bits = torch.int16 if plain.element_size() == 2 else torch.uint8
        return plain.view(bits).numpy().view(getattr(ml_dtypes, own))
    return plain.numpy()


def flat(value: Any) -> dict[str, np.ndarray]:
    """Inputs by dotted name; what is no array is left out."""
    arrays = {name or "0": as_array(name, item) for name, item in leaves("", value)}
    return {name: array for name, array in arrays.items() if array is not None}


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A call's arguments: positional ones under their number."""
    return flat({**{str(i): value for i, value in enumerate(args)}, **kwargs})


# -- Environment -----------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """Versions of what is loaded, the devices, and whether float32 products are computed as such."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "numpy": np.__version__}
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    reduced = False
    if jax is not None:
        found |= {"jax": jax.__version__, "jax backend": jax.default_backend()}
        full = jax.config.jax_default_matmul_precision in ("highest", "float32")
        reduced = jax.default_backend() != "cpu" and not full
    if torch is not None:
        found |= {"torch": torch.__version__}
        reduced |= torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    return {**found, MATMULS: REDUCED if reduced else "full", **more}
