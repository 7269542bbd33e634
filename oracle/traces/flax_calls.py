"""Recording a Flax module, NNX or Linen, without editing it.

Linen hands every method call to interceptors. NNX has no such place, so that for the
time of the recording the classes of the model's modules get another `__call__`.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from flax import linen, nnx

from jaxgpt.errors import InputError
from oracle.traces.recorder import OUTPUT, Recorder, environment, given
from oracle.traces.trace import Trace

Call = Callable[..., Any]


def record_flax(
    module: Any,
    *args: Any,
    include: str | None = None,
    exclude: str | None = None,
    **kwargs: Any,
) -> Trace:
    """The trace of `module(*args, **kwargs)`: the output of every submodule under its path, in the order they finish.

    A Linen module is given its variables first, as `apply` is. The outermost module's
    output is `output`; the k-th call of a module ends in `#k`.

    Args:
        module: an `nnx.Module`, a `linen.Module`, or for NNX a method of one.
        include: keep only taps in whose name this regular expression is found.
        exclude: leave out taps in whose name this one is found.

    Raises:
        InputError: a part of the model runs inside jit, scan, remat or another
            transformation, where nothing has a value yet.
    """
    recorder = Recorder(include, exclude)
    if isinstance(module, linen.Module):
        if not args:
            raise InputError("record_flax of a Linen module takes its variables first: record_flax(model, params, x)")
        _run_linen(module, recorder, args, kwargs)
        return recorder.trace(given(args[1:], kwargs), environment(recorder="flax linen"))
    owner = module if isinstance(module, nnx.Module) else getattr(module, "__self__", None)
    if not isinstance(owner, nnx.Module):
        raise InputError(f"record_flax takes a Flax module or a method of one, got {type(module).__name__}")
    _run_nnx(module, owner, recorder, args, kwargs)
    return recorder.trace(given(args, kwargs), environment(recorder="flax nnx"))


# -- Linen -----------------------------------------------------------------------------


def _run_linen(module: linen.Module, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def interceptor(call: Call, args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            recorder.call(".".join(map(str, context.module.path)) or OUTPUT, output)
        return output

    with linen.intercept_methods(interceptor):
        module.apply(*args, **kwargs)


# -- NNX -------------------------------------------------------------------------------


def _run_nnx(runner: Any, owner: nnx.Module, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parts = {id(part): ".".join(map(str, path)) or OUTPUT for path, part in nnx.iter_modules(owner)}
    classes = {type(part) for _, part in nnx.iter_modules(owner) if callable(part)}
    observer = _Observer(recorder, parts)
    with _patched(classes, observer.watched):
        output = runner(*args, **kwargs)
    if not observer.saw_whole_run:  # a method other than __call__
        recorder.call(OUTPUT, output)
    uncallable = {name for name, part in ((parts[id(p)], p) for _, p in nnx.iter_modules(owner)) if not callable(part)}
    recorder.never_called(name for name in parts.values() if name not in {*uncallable, OUTPUT})


class _Observer:
    def __init__(self, recorder: Recorder, parts: dict[int, str]):
        self._recorder, self._parts = recorder, parts
        self._running: set[int] = set()
        self.saw_whole_run = False

    def watched(self, call: Call) -> Call:
        @wraps(call)
        def watching(module: Any, *args: Any, **kwargs: Any) -> Any:
            if id(module) in self._running:  # super().__call__ of a watched class
                return call(module, *args, **kwargs)
            self._running.add(id(module))
            try:
                output = call(module, *args, **kwargs)
            finally:
                self._running.discard(id(module))
            name = self._parts.get(id(module))
            if name is None:
                raise InputError(
                    f"a {type(module).__name__} ran that is no part of the recorded module: a transformation such as "
                    "nnx.jit, nnx.scan or nnx.remat made a copy, or it was built during the call; record without it"
                )
            self.saw_whole_run |= name == OUTPUT
            self._recorder.call(name, output)
            return output

        return watching


@contextmanager
def _patched(classes: set[type], wrapper: Callable[[Call], Call]) -> Generator[None, None, None]:
    """Each class calls `wrapper(its __call__)` until the end of the block."""
    # All originals first: a class may inherit the one of another in the set.
    wrapped = {cls: wrapper(cls.__call__) for cls in classes}
    own = {cls: vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)}
    try:
        for cls, call in wrapped.items():
            setattr(cls, "__call__", call)  # noqa: B010
        yield
    finally:
        for cls in wrapped:
            if cls in own:
                setattr(cls, "__call__", own[cls])  # noqa: B010
            else:
                delattr(cls, "__call__")
