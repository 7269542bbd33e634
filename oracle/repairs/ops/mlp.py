"""Repairs of the feed-forward's activation, gated or not."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.ops import Leaves
from oracle.repairs.ops.black_box import BlackBox, Change, Maker, op_repair
from oracle.repairs.repair import Repair

Scalar = Callable[[Any], Any]

KINDS: dict[str, Scalar] = {
    "exact GELU (erf)": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)),
    "tanh GELU": lambda x: x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "quick GELU": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "SiLU": lambda x: x * jax.nn.sigmoid(x),
    "ReLU": lambda x: jnp.maximum(x, 0),
    "squared ReLU": lambda x: jnp.square(jnp.maximum(x, 0)),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""By the name that the cause says."""
OURS = {"gelu": "exact GELU (erf)", "gelu_tanh": "tanh GELU", "silu": "SiLU"}
"""torchref's names of activations."""
CONFIG = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
"""`hidden_act` of torchref's names."""
NONE = "no activation"

_OPS = ("activation", "gated_activation")


def right(box: BlackBox) -> Callable[..., Any]:
    """As the reference computes the op: of x, or of gate and up."""
    return of(KINDS[OURS[box.facts.activation]])


def of(kind: Scalar) -> Callable[..., Any]:
    """The op with some activation."""

    def op(p: Leaves, x: Any, *up: Any) -> Any:
        return kind(x) * up[0] if up else kind(x)

    return op


def instead(named: str, kind: Scalar) -> Maker:
    """The difference to another activation."""

    def maker(box: BlackBox) -> Iterator[Change]:
        proper = OURS[box.facts.activation]
        if named != proper:
            yield from _configured(box, named)
            yield box.less(of(kind), right(box), named, proper)

    return maker


def _configured(box: BlackBox, named: str) -> Iterator[Change]:
    has = box.site.candidate.config.hidden_act
    if any(CONFIG[key] == has and OURS[key] == named for key in OURS):
        wanted = CONFIG[box.facts.activation]
        yield from box.configured(f"with {wanted} in the config", hidden_act=wanted)


def swapped(box: BlackBox) -> Iterator[Change]:
    """Gate and up the other way round."""
    yield box.fed("with gate and up swapped back", lambda gate, up: (up, gate))


def gated_otherwise(named: str, wrong: Callable[[Scalar, Any, Any], Any]) -> Maker:
    """The difference to another combination of gate and up: `wrong(activation, gate, up)`."""

    def maker(box: BlackBox) -> Iterator[Change]:
        kind = KINDS[OURS[box.facts.activation]]
        yield box.less(lambda p, gate, up: wrong(kind, gate, up), right(box), named, "activation(gate) * up")

    return maker


_CHECK = "check `hidden_act` in the config (jaxgpt/config.py) and the activation in jaxgpt/ops.py"
_GATED = "the op is activation(gate) * up: gated_activation in jaxgpt/ops.py"
_WAYS: tuple[tuple[str, str, Callable[[Scalar, Any, Any], Any]], ...] = (
    ("up projection ignored in the gated MLP", "activation(gate)", lambda act, gate, up: act(gate)),
    ("gate ignored in the gated MLP", "activation(up)", lambda act, gate, up: act(up)),
    ("gate and up added", "activation(gate) + up", lambda act, gate, up: act(gate) + up),
    ("activation over gate times up", "activation(gate * up)", lambda act, gate, up: act(gate * up)),
    ("activation on gate and up", "activation(gate) * activation(up)", lambda act, gate, up: act(gate) * act(up)),
)
REPAIRS: tuple[Repair, ...] = (
    op_repair("gate and up swapped", _GATED, ("gated_activation",), swapped),
    op_repair("activation missing", _CHECK, _OPS, instead(NONE, lambda x: x)),
    *(op_repair(f"activation is {named}", _CHECK, _OPS, instead(named, kind)) for named, kind in KINDS.items()),
    *(op_repair(cause, _GATED, ("gated_activation",), gated_otherwise(named, wrong)) for cause, named, wrong in _WAYS),
)
"""Repairs of activations."""
