"""Recording a torch module by forward hooks: nothing of the model is edited."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from jaxgpt.errors import InputError
from oracle.traces.recorder import OUTPUT, Recorder, environment, given, leaves
from oracle.traces.trace import Trace

GRADIENT = "grad."
"""Begins the name of a gradient with respect to a tap."""


def record_torch(
    module: Any,
    *args: Any,
    include: str | None = None,
    exclude: str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Trace:
    """The trace of `module(*args, **kwargs)`: the output of every submodule under its name, in the order they finish.

    A module's output comes after those of its children; the outermost one's is `output`.
    What a fused kernel computes without calling its modules cannot be seen; such
    modules are in `Trace.left_out`.

    Args:
        module: an `nn.Module`, or a method of one.
        include: keep only taps in whose name this regular expression is found.
        exclude: leave out taps in whose name this one is found.
        loss: makes a scalar of the output; then the gradients with respect to all taps
            follow as `grad.<tap>`, in the order in which backpropagation meets them.

    Raises:
        InputError: a module that runs compiled, so that hooks see nothing.
    """
    owner = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise InputError(f"record_torch takes an nn.Module or a method of one, got {type(module).__name__}")
    names = {name: part for name, part in owner.named_modules() if name}
    _refuse_compiled(owner, names)
    hooks = _Hooks(Recorder(include, exclude), keep_graph=loss is not None)
    with ExitStack() as stack:
        for name, part in names.items():
            stack.callback(part.register_forward_hook(hooks.hook(name)).remove)
        stack.enter_context(torch.set_grad_enabled(loss is not None))
        output = module(*args, **kwargs)
        hooks.saw(OUTPUT, output)
        if loss is not None:
            hooks.add_gradients(loss(output))
    hooks.recorder.never_called(name for name, part in names.items() if type(part).forward is not nn.Module.forward)
    return hooks.recorder.trace(given(args, kwargs), _environment(owner))


def _refuse_compiled(owner: nn.Module, names: dict[str, nn.Module]) -> None:
    for name, part in {OUTPUT: owner, **names}.items():
        compiled = getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in dict(part.named_children())
        if compiled or isinstance(part, torch.jit.ScriptModule):
            raise InputError(f"{name} is compiled, so hooks would see nothing: record the module before compiling it")


def _environment(module: nn.Module) -> dict[str, str]:
    device = next((str(parameter.device) for parameter in module.parameters()), "cpu")
    return environment(recorder="torch", device=device, training="yes" if module.training else "no")


class _Hooks:
    def __init__(self, recorder: Recorder, keep_graph: bool):
        self.recorder, self._keep_graph = recorder, keep_graph
        self._live: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            self.saw(name, output)

        return after_forward

    def saw(self, name: str, output: Any) -> None:
        numbered = self.recorder.call(name, output)
        if self._keep_graph:
            tensors = ((leaf, item) for leaf, item in leaves(numbered, output) if leaf in self.recorder.taps)
            self._live |= {leaf: item for leaf, item in tensors if isinstance(item, Tensor) and item.requires_grad}

    def add_gradients(self, loss: Tensor) -> None:
        if loss.numel() != 1 or not self._live:
            raise InputError("loss must make one number of the output, and some tap must depend on a parameter")
        names = list(reversed(self._live))
        gradients = torch.autograd.grad(loss, [self._live[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            self.recorder.add(f"{GRADIENT}{name}", gradient)  # None, where the loss does not depend on it, is nothing
