"""Repairs of what an op reads: found by computing it from other taps until it gives what the pass gave.

Each op is right on the reference's inputs, so a tap that differs first in a free
forward was computed from something else. What that was is searched among the
candidate's own earlier taps, model inputs and parameters; then the op, in the pass,
is given what the table says it reads. Where that is what it read, the table itself may
be wrong (`table_rows`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from jaxgpt.taps import ops
from oracle import model_inputs
from oracle.candidate import Candidate, Unrunnable
from oracle.repairs import interception, readings, table_rows
from oracle.repairs.readings import Reading
from oracle.repairs.repair import Repair, Variant
from oracle.results import layer_of
from oracle.rungs import forward
from oracle.rungs.forward import ForwardSite
from oracle.site import Site

# -- The search ------------------------------------------------------------------------


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
    return readings.of_candidate(site.candidate, ops(site.candidate.config), values).reading(site.op)


def all_found(site: ForwardSite) -> list[Reading]:
    """The same of every op, as far as it is found."""
    table = ops(site.candidate.config)
    made = readings.of_candidate(site.candidate, table, _values(site))
    return [reading for reading in map(made.reading, table) if reading is not None]


# -- What it is called -----------------------------------------------------------------


def _stream(tap: str) -> bool:
    return tap.endswith("_residual") or tap in ("embed.sum", "embed.tokens")


def _bypassed(op: str, wanted: str, read: str) -> bool:
    return op == "projection" and wanted.endswith("_norm") and _stream(read)


def _layer(tap: str) -> int:
    number = layer_of(tap)
    return -1 if number is None else number


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
    "QK-norm bypassed": lambda op, wanted, read: wanted.endswith(("q_norm", "k_norm")) and read.endswith("_heads"),
    "RoPE bypassed": lambda op, wanted, read: (
        wanted.endswith("_rope") and read.endswith(("_heads", "_norm")) and op == "scores"
    ),
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
            reading, row = site.once(found), site.once(table_rows.wrong_row)
            if reading is not None and cause(reading) == named:
                repaired = _resequenced(site) if _reads_later(site, reading) else _as_wired(site, [site.op.tap])
                yield Variant(str(reading), repaired)
            elif row is not None and cause(row) == named:
                yield Variant(str(row), table_rows.corrected(site, row), table_rows.advice(row))

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

    all_of_them = site.once(all_found)
    taps = [each.op.tap for each in all_of_them if all(map(moved, each.op.inputs, each.inputs))]
    return interception.settled(site.candidate, taps, 2 * site.candidate.config.num_hidden_layers + 1)


def _exchanged_layers(site: Site) -> Iterator[Variant]:
    """Layers that run under each other's names: all that an op of one has are the parameters of another."""
    if not isinstance(site, ForwardSite) or not (own := site.once(found)) or own.parameters == own.op.parameters:
        return
    found_everywhere = site.once(all_found)
    used = {_layer(reading.op.parameters): _layer(reading.parameters) for reading in found_everywhere}
    alike = all(
        reading.op.inputs == reading.inputs
        and reading.parameters == reading.op.parameters.replace(f".{here}.", f".{used[here]}.", 1)
        for reading in found_everywhere
        for here in [_layer(reading.op.parameters)]
    )
    table = [op for op in ops(site.candidate.config) if op.parameters and _layer(op.tap) in used]
    if alike and -1 not in used and sorted(used) == sorted(used.values()) and len(found_everywhere) == len(table):
        exchanged = ", ".join(f"layer {here}'s instead of layer {read}'s" for here, read in used.items())
        yield Variant(
            f"with parameters of {exchanged}", _as_wired(site, [reading.op.tap for reading in found_everywhere])
        )


def _another_op(site: Site) -> Iterator[Variant]:
    if isinstance(site, ForwardSite) and site.once(found) is None and site.once(table_rows.wrong_row) is None:
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
