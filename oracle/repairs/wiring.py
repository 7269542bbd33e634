"""Repairs of what an op reads: found by computing it from other taps until it gives what the pass gave.

Each op is right on the reference's inputs, so a tap that differs first in a free
forward was computed from something else. What that was is searched among the
candidate's own earlier taps, model inputs and parameters; then the op, in the pass,
is given what the table says it reads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax.numpy as jnp

from jaxgpt import model
from jaxgpt.taps import INPUTS, Op, ops
from oracle import model_inputs
from oracle.candidate import Candidate, Unrunnable, unrunnable
from oracle.repairs import interception
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import forward
from oracle.rungs.forward import ForwardSite
from oracle.site import Site

NEAR = 16
"""Earlier taps of a fitting shape that are tried for both inputs of a sum."""


@dataclass(frozen=True)
class Reading:
    """What an op was computed from."""

    op: Op
    inputs: tuple[str, ...]
    """Taps, model inputs, or descriptions of changed model inputs."""
    parameters: str

    def __str__(self) -> str:
        changed = [
            f"{wanted} instead of {read}"
            for wanted, read in zip(self.op.inputs, self.inputs, strict=True)
            if wanted != read
        ]
        if self.parameters != self.op.parameters:
            changed.append(f"the parameters of {self.op.parameters} instead of {self.parameters}")
        return f"with {self.op.tap} computed from {' and '.join(changed)}"


# -- The search ------------------------------------------------------------------------


def reading(candidate: Candidate, op: Op, table: Sequence[Op], values: Mapping[str, Any]) -> Reading | None:
    """The only thing that gives what the pass gave; None if nothing does, or what ought to."""
    if gives(candidate, as_it_should(op), values):
        return None
    return next((a for a in _attempts(candidate, op, table, values) if gives(candidate, a, values)), None)


def as_it_should(op: Op) -> Reading:
    """What the table says."""
    return Reading(op, op.inputs, op.parameters)


def gives(candidate: Candidate, attempt: Reading, values: Mapping[str, Any]) -> bool:
    """The op, reading that, gives what the pass gave."""
    try:
        with unrunnable("op"):
            return _same(_run(candidate, attempt, values), values[attempt.op.tap])
    except Unrunnable:
        return False


def _attempts(candidate: Candidate, op: Op, table: Sequence[Op], values: Mapping[str, Any]) -> Iterator[Reading]:
    for kind in dict.fromkeys(key.partition(" ")[2] for key in values if " " in key):
        names = [f"{name} {kind}" if f"{name} {kind}" in values else name for name in op.inputs]
        yield Reading(op, tuple(names), op.parameters)
    choices = [_like(name, op, table, values) for name in op.inputs]
    for slot, names in enumerate(choices):
        for name in names:
            yield Reading(op, (*op.inputs[:slot], name, *op.inputs[slot + 1 :]), op.parameters)
    for module in _modules(candidate, op):
        yield Reading(op, op.inputs, module)
    if len(op.inputs) == 2:
        for pair in product(*(names[:NEAR] for names in choices)):
            yield Reading(op, pair, op.parameters)


def _like(name: str, op: Op, table: Sequence[Op], values: Mapping[str, Any]) -> list[str]:
    """Taps that the op could have been given in place of one: earlier ones, the latest first, then later streams."""
    if name in INPUTS or name.startswith("cache."):
        return []
    here = table.index(op)
    before = [other.tap for other in reversed(table[:here]) if other.tap != name]
    after = [other.tap for other in table[here + 1 :] if other.tap in values and other.function == "add"]
    shape, dtype = values[name].shape, values[name].dtype
    return [tap for tap in (*before, *after) if (values[tap].shape, values[tap].dtype) == (shape, dtype)]


def _modules(candidate: Candidate, op: Op) -> list[str]:
    if not op.parameters:
        return []
    shapes = _shapes(candidate, op.parameters)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in candidate.params)
    return [module for module in modules if module != op.parameters and _shapes(candidate, module) == shapes]


def _shapes(candidate: Candidate, module: str) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in model.leaves(candidate.params, module).items()}


def _run(candidate: Candidate, attempt: Reading, values: Mapping[str, Any]) -> Any:
    p = model.leaves(candidate.params, attempt.parameters) if attempt.parameters else {}
    inputs = [values[name] for name in attempt.inputs]
    return candidate.function(attempt.op)(candidate.config, p, *inputs)


def _same(given: Any, made: Any) -> bool:
    if given.shape != made.shape or given.dtype != made.dtype:
        return False
    if not jnp.issubdtype(made.dtype, jnp.floating):
        return bool((given == made).all())
    a, b = given.astype(jnp.float32), made.astype(jnp.float32)
    size = float(jnp.linalg.norm(b.ravel()))
    # The pass may round otherwise than the op alone: it is compiled as a whole.
    return float(jnp.linalg.norm((a - b).ravel())) <= 8 * float(jnp.finfo(made.dtype).eps) * size


def _values(site: ForwardSite) -> dict[str, Any]:
    """Taps, model inputs, and model inputs as somebody may have got them wrong."""
    probe = site.forwards.probe
    given = model_inputs.of_sequences(*map(jnp.asarray, (probe.ids, probe.positions, probe.segments)))
    slots, positions, same = given["slots"], given["positions"], jnp.ones_like(given["segments"])
    wrong = {
        "positions off by one (+)": positions + 1,
        "positions off by one (+, clipped)": jnp.minimum(positions + 1, positions.max()),
        "positions off by one (-)": jnp.maximum(positions - 1, 0),
        "positions not restarting": slots,
        "slots off by one (+)": slots + 1,
        "slots off by one (-)": slots - 1,
        "segments ignored": same,
        "key_segments ignored": same,
    }
    return {**given, **wrong, **site.forwards.taps(site.candidate)}


def found(site: ForwardSite) -> Reading | None:
    """What the site's tap was computed from, where that is not what the table says."""
    try:
        values = _values(site)
    except Unrunnable:
        return None
    return reading(site.candidate, site.op, ops(site.candidate.config), values)


def all_found(site: ForwardSite) -> list[Reading]:
    """The same of every op, as far as it is found."""
    values, table = _values(site), ops(site.candidate.config)
    readings = (reading(site.candidate, op, table, values) for op in table)
    return [reading for reading in readings if reading is not None]


# -- What it is called -----------------------------------------------------------------


def _stream(tap: str) -> bool:
    return tap.endswith("_residual") or tap in ("embed.sum", "embed.tokens")


def _bypassed(op: str, wanted: str, read: str) -> bool:
    return op == "projection" and wanted.endswith("_norm") and _stream(read)


def _layer(tap: str) -> int:
    return int(tap.split(".")[1]) if tap.startswith("layers.") else -1


def _next_stream(tap: str) -> str:
    if tap.endswith("attn_residual"):
        return tap.replace("attn_residual", "mlp_residual")
    return f"layers.{_layer(tap) + 1}.attn_residual" if _stream(tap) else ""


def _of(tap: str) -> str:
    return tap.rpartition(".")[2].partition("_")[0]


ORDER = "layers run in the wrong order"
Kind = Callable[[str, str, str], bool]
"""(the op's function, what it should read, what it reads) to whether the cause applies."""
KINDS: dict[str, Kind] = {
    "position ids off by one": lambda op, wanted, read: read.startswith("positions off by one"),
    "position ids do not restart with a document": lambda op, wanted, read: read == "positions not restarting",
    "position ids count the padding": lambda op, wanted, read: read.startswith("positions counting the padding"),
    "first row's positions used for every row": lambda op, wanted, read: read == "positions of the first row",
    "cache slot off by one": lambda op, wanted, read: op == "store" and read.startswith("slots off by one"),
    "causal mask off by one": lambda op, wanted, read: read.startswith("slots off by one"),
    "documents not separated": lambda op, wanted, read: read.endswith("segments ignored"),
    "norm bypassed": _bypassed,
    "final norm bypassed": lambda op, wanted, read: op == "head" and _stream(read),
    "MLP in parallel with attention": lambda op, wanted, read: (
        op == "norm" and wanted.endswith("attn_residual") and _stream(read) and _layer(read) < _layer(wanted)
    ),
    "post-norm instead of pre-norm": lambda op, wanted, read: op == "norm" and read == _next_stream(wanted),
    ORDER: lambda op, wanted, read: (
        op == "norm" and _stream(wanted) and read.endswith("mlp_residual") and _layer(read) > _layer(wanted)
    ),
    "attention's residual contributes nothing": lambda op, wanted, read: (
        op == "add" and wanted.endswith("attn_residual") and _stream(read) and _layer(read) < _layer(wanted)
    ),
    "residual added to the normed stream": lambda op, wanted, read: (
        op == "add" and _stream(wanted) and read.endswith("_norm")
    ),
    "layer skipped": lambda op, wanted, read: (
        wanted.endswith("mlp_residual") and _stream(read) and _layer(read) < _layer(wanted)
    ),
    "RoPE bypassed": lambda op, wanted, read: wanted.endswith("_rope") and read.endswith("_heads") and op == "scores",
    "keys stored before RoPE": lambda op, wanted, read: wanted.endswith("_rope") and op == "store",
    "gate and up swapped": lambda op, wanted, read: {_of(wanted), _of(read)} == {"gate", "up"},
    "q, k and v exchanged": lambda op, wanted, read: (
        _of(wanted) != _of(read) and {_of(wanted), _of(read)} <= {"q", "k", "v"}
    ),
}
"""By cause, narrow ones first."""
OTHER = "an op reads the wrong tap"
PARAMETERS = "an op uses another module's parameters"


def cause(reading: Reading) -> str:
    """What a wrong reading is called."""
    if reading.parameters != reading.op.parameters:
        return PARAMETERS
    pairs = [pair for pair in zip(reading.op.inputs, reading.inputs, strict=True) if pair[0] != pair[1]]
    names = {next((name for name, kind in KINDS.items() if kind(reading.op.function, *pair)), OTHER) for pair in pairs}
    return names.pop() if len(names) == 1 else OTHER


def _rewired(named: str) -> Callable[[Site], Iterator[Variant]]:
    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, ForwardSite):
            reading = site.once(found)
            if reading is not None and cause(reading) == named:
                repaired = _resequenced(site) if _reads_later(site, reading) else _as_wired(site, [site.op.tap])
                yield Variant(str(reading), repaired)

    return variants


def _as_wired(site: ForwardSite, taps: Sequence[str]) -> Candidate:
    return interception.forward(site.candidate, dict.fromkeys(taps, interception.as_wired))


def _reads_later(site: ForwardSite, reading: Reading) -> bool:
    order = [op.tap for op in ops(site.candidate.config)]
    return any(name in order and order.index(name) > order.index(reading.op.tap) for name in reading.inputs)


def _resequenced(site: ForwardSite) -> Candidate:
    """Every op that reads another stream or norm, as wired: in a pass of another order one such op is never alone."""

    def moved(wanted: str, read: str) -> bool:
        return wanted == read or _stream(wanted) or wanted.endswith("_norm")

    readings = site.once(all_found)
    taps = [each.op.tap for each in readings if all(map(moved, each.op.inputs, each.inputs))]
    return interception.settled(site.candidate, taps, 2 * site.candidate.config.num_hidden_layers + 1)


def _exchanged_layers(site: Site) -> Iterator[Variant]:
    """Layers that run under each other's names: all that an op of one has are the parameters of another."""
    if not isinstance(site, ForwardSite) or not (own := site.once(found)) or own.parameters == own.op.parameters:
        return
    readings = site.once(all_found)
    used = {_layer(reading.op.parameters): _layer(reading.parameters) for reading in readings}
    alike = all(
        reading.op.inputs == reading.inputs
        and reading.parameters == reading.op.parameters.replace(f".{here}.", f".{used[here]}.", 1)
        for reading in readings
        for here in [_layer(reading.op.parameters)]
    )
    table = [op for op in ops(site.candidate.config) if op.parameters and _layer(op.tap) in used]
    if alike and -1 not in used and sorted(used) == sorted(used.values()) and len(readings) == len(table):
        exchanged = ", ".join(f"layer {here}'s instead of layer {read}'s" for here, read in used.items())
        yield Variant(f"with parameters of {exchanged}", _as_wired(site, [reading.op.tap for reading in readings]))


def _another_op(site: Site) -> Iterator[Variant]:
    if isinstance(site, ForwardSite) and site.once(found) is None:
        changes = {site.op.tap: interception.untouched}
        yield Variant("with the op that was measured alone", interception.forward(site.candidate, changes))


_WIRING = "give the op what the table says it reads: layer_ops in jaxgpt/taps.py, run in jaxgpt/model.py"
REPAIRS: tuple[Repair, ...] = (
    Repair(ORDER, _WIRING, (forward.NAME,), _exchanged_layers),
    *(Repair(name, _WIRING, (forward.NAME,), _rewired(name)) for name in (*KINDS, PARAMETERS, OTHER)),
    Repair(
        "the forward pass runs another op than its own",
        "look for an op that is replaced inside the forward pass (jaxgpt/model.py)",
        (forward.NAME,),
        _another_op,
        last_resort=True,
    ),
)
"""Repairs of the wiring of whole forwards."""
