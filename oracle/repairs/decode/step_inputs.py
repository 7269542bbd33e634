"""What an op of a cached step was computed from: searched among the step's taps and what follows from its cache.

Model inputs that somebody may have got wrong are among them, under the name of the
right one and a few words.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.taps import Op, Wiring, ops
from oracle import model_inputs
from oracle.candidate import Candidate
from oracle.repairs import readings
from oracle.repairs.decode import caches
from oracle.repairs.readings import Reading
from oracle.rungs.decode_site import Call, DecodeSite

BEYOND = 8
"""Wrong positions of so many contexts are recognised."""


def inputs(candidate: Candidate, call: Call) -> dict[str, Any]:
    """The model inputs that follow from the ids, the counts and the cache."""
    return model_inputs.of_step(candidate.config, jnp.asarray(call.ids), jnp.asarray(call.counts), call.before)


def values(candidate: Candidate, call: Call) -> dict[str, Any]:
    """Taps, model inputs, and model inputs as somebody may have got them wrong."""
    given = inputs(candidate, call)
    return {**given, **_wrong_positions(candidate, call, given), **_wrong_slots(call, given), **call.taps}


def _wrong_positions(candidate: Candidate, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    positions, padding = given["positions"], (call.ids.shape[1] - call.counts)[:, None]
    highest = candidate.config.max_position_embeddings - 1
    real = jnp.arange(call.ids.shape[1]) < call.counts[:, None]
    restarting = jnp.broadcast_to(jnp.arange(call.ids.shape[1], dtype=positions.dtype), positions.shape)
    return {
        "positions off by one (+)": positions + 1,
        "positions off by one (+, clipped)": jnp.minimum(positions + 1, highest),
        "positions off by one (-)": jnp.maximum(positions - 1, 0),
        "positions counting the padding": positions + padding,
        "positions counting the padding (clipped)": jnp.minimum(positions + padding, highest),
        "positions of the first row": jnp.broadcast_to(positions[:1], positions.shape),
        "positions of the longest row": jnp.broadcast_to(positions.max(axis=0, where=real, initial=0), positions.shape),
        "positions from zero in this step": restarting,
    }


def _wrong_slots(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    slots, room = given["slots"], call.before.slots
    wrong = {"slots off by one (+)": slots + 1, "slots off by one (-)": slots - 1}
    modulus = _modulus(call, given)
    if modulus is not None:
        # What is padding stays outside, or is wrapped with the rest.
        wrong["slots wrapped around"] = jnp.where(slots < room, slots % modulus, slots)
        wrong["slots wrapped around (with padding)"] = slots % modulus
    return wrong


def _modulus(call: Call, given: Mapping[str, Any]) -> int | None:
    """How far before its own slot a new value was written, in the first layer and row where it was."""
    slots, room = np.asarray(given["slots"]), call.before.slots
    for part, new in (("keys", "k_rope" if "layers.0.attn.k_rope" in call.taps else "k_heads"), ("values", "v_heads")):
        buffer, written = (np.asarray(call.taps[f"layers.0.attn.{name}"]) for name in (part, new))
        if buffer.shape[2] != room:
            return None
        for row, count in enumerate(call.counts):
            last, value = int(slots[row, count - 1]), written[row, :, count - 1]
            at = np.flatnonzero((buffer[row] == value[:, None]).all(axis=(0, 2)))
            if at.size and last not in at:
                return int(last - at.max()) if at.max() < last else None
    return None


def found(site: DecodeSite) -> Reading | None:
    """What the site's tap was computed from, where that is not what the table says."""
    history = site.once(caches.observed)
    if not history:
        return None
    table = ops(site.candidate.config, Wiring(cached=True))
    return readings.of_candidate(site.candidate, table, values(site.candidate, history[-1])).reading(site.op)


def own(site: DecodeSite) -> bool:
    """The tap is what the op gives on what it should read, so that something else is wrong."""
    history = site.once(caches.observed)
    return not history or as_alone(site.candidate, site.op, history[-1])


def as_alone(candidate: Candidate, op: Op, call: Call) -> bool:
    """The op that was measured alone gives what the step gave."""
    return readings.of_candidate(candidate, (), values(candidate, call)).is_as_wired(op)


def stores_as_alone(candidate: Candidate, call: Call) -> bool:
    """New keys are written where they belong."""
    table = ops(candidate.config, Wiring(cached=True))
    return as_alone(candidate, next(op for op in table if op.function == "store"), call)


def other_positions(site: DecodeSite) -> bool:
    """The tap is that of integer positions, if not of the right ones."""
    history = site.once(caches.observed)
    if not history or site.op.inputs != ("positions",):
        return False
    call, candidate = history[-1], site.candidate
    real = np.arange(call.ids.shape[1]) < call.counts[:, None]
    # A learned position has its row; an angle goes on beyond the context.
    most = candidate.config.max_position_embeddings * (1 if site.op.parameters else BEYOND)
    every = jnp.arange(most, dtype=jnp.int32)[None]
    p = model.leaves(candidate.params, site.op.parameters) if site.op.parameters else {}
    table = np.asarray(candidate.function(site.op)(candidate.config, p, every))[0].astype(np.float32)
    given = np.asarray(call.taps[site.op.tap])[real].astype(np.float32)
    nearest = np.array([np.abs(table - row).sum(axis=-1).argmin() for row in given])
    return bool(np.allclose(given, table[nearest], rtol=1e-5, atol=1e-6))
