"""Repairs of cached decoding: the step is a black box that is given another cache, or whose cache is put right.

Which of them apply is read off the candidate's own calls: how its lengths move, what
its first wrong tap was computed from, and in which slots the cache that it hands on
differs from the one that its attention read.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op, Wiring, ops
from oracle.repairs import caches, interception, wiring
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import decode
from oracle.rungs.decode_site import Call, DecodeSite
from oracle.site import Site

POSITIONS = ("embed.positions", "rope.angles")
# -- Lengths ---------------------------------------------------------------------------


def _moves(site: DecodeSite) -> str:
    """How the lengths move in the first call in which they do not move by the tokens it was given."""
    for call in site.once(caches.observed)[:-1]:
        moved = np.asarray(call.after.lengths) - np.asarray(call.before.lengths)
        if np.array_equal(moved, call.counts):
            continue
        if not moved.any():
            return "not"
        return "padding" if (moved == call.ids.shape[1]).all() else "otherwise"
    return ""


def lengths(how: str) -> Callable[[Site], Iterator[Variant]]:
    """The lengths set to what they were plus the tokens given."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, DecodeSite) and _moves(site) == how:
            change = "with the lengths advanced by the tokens of each row"
            yield Variant(change, caches.around(site.candidate, caches.as_given, caches.advanced))

    return variants


def offset(site: Site) -> Iterator[Variant]:
    """Lengths that the step takes for one more or one less, so that positions, mask and slots are all off."""
    if not isinstance(site, DecodeSite) or site.op.tap not in POSITIONS:
        return
    history = site.once(caches.observed)
    if not history or _mask_is_right(site, history[-1]):
        return
    for by, named in ((-1, "lowered"), (1, "raised")):
        for when, condition in _conditions(site):
            yield Variant(
                f"with the cache's lengths {named} by one {when}".rstrip(),
                caches.around(site.candidate, _shifted(by, condition), caches.advanced),
            )


Condition = Callable[[int, Any], Any]
"""Which rows of a step are wrong, by the number of ids it is given and the cache's lengths (B,)."""


def _conditions(site: DecodeSite) -> Iterator[tuple[str, Condition]]:
    """When a step is wrong, in words and as a function."""
    if site.last == 0:
        yield "", lambda width, lengths: True
        yield "in the prefill", lambda width, lengths: width > 1
    else:
        # A prompt of one token is a prefill as well.
        yield "in every step after the prefill", lambda width, lengths: (lengths > 0) & (width == 1)
        yield "in steps of one token", lambda width, lengths: width == 1


def _shifted(by: int, condition: Condition) -> caches.Before:
    def before(cache: KVCache, ids: Any) -> KVCache:
        wrong = condition(ids.shape[1], cache.lengths)
        return cache._replace(lengths=jnp.where(wrong, cache.lengths + by, cache.lengths))

    return before


def _mask_is_right(site: DecodeSite, call: Call) -> bool:
    given = model.cached_inputs(site.candidate.config, jnp.asarray(call.ids), jnp.asarray(call.counts), call.before)
    right = np.asarray(given["key_slots"])[None, None] <= np.asarray(given["slots"])[:, :, None]
    mask, real = np.asarray(call.taps["mask"])[:, 0], np.arange(call.ids.shape[1]) < call.counts[:, None]
    return mask.shape == right.shape and bool(np.array_equal(mask[real], right[real]))


# -- What an op was computed from ------------------------------------------------------


def _values(site: DecodeSite, call: Call) -> dict[str, Any]:
    """Taps, model inputs, and model inputs as somebody may have got them wrong."""
    config = site.candidate.config
    given = model.cached_inputs(config, jnp.asarray(call.ids), jnp.asarray(call.counts), call.before)
    positions, slots = given["positions"], given["slots"]
    highest, padding = config.max_position_embeddings - 1, (call.ids.shape[1] - call.counts)[:, None]
    wrong = {
        "positions off by one (+)": positions + 1,
        "positions off by one (+, clipped)": jnp.minimum(positions + 1, highest),
        "positions off by one (-)": jnp.maximum(positions - 1, 0),
        "positions counting the padding": positions + padding,
        "positions counting the padding (clipped)": jnp.minimum(positions + padding, highest),
        "positions of the first row": jnp.broadcast_to(positions[:1], positions.shape),
        "slots off by one (+)": slots + 1,
        "slots off by one (-)": slots - 1,
    }
    return {**given, **wrong, **call.taps}


def found(site: DecodeSite) -> wiring.Reading | None:
    """What the site's tap was computed from, where that is not what the table says."""
    history = site.once(caches.observed)
    if not history:
        return None
    table = ops(site.candidate.config, Wiring(cached=True))
    return wiring.reading(site.candidate, site.op, table, _values(site, history[-1]))


def rewired(named: str) -> Callable[[Site], Iterator[Variant]]:
    """The op computed from what the table says, in every call."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, DecodeSite) or (site.op.tap in POSITIONS and not _only_positions(site)):
            return
        reading = site.once(found)
        if reading is not None and _called(reading) == named:
            yield Variant(str(reading), interception.cached(site.candidate, _given_back(reading)))

    return variants


SLOTS = "cache slot off by one"


def _called(reading: wiring.Reading) -> str:
    name = wiring.cause(reading)
    # The mask is the first to read the slots; the stores come after it.
    return SLOTS if name == "causal mask off by one" else name


def _given_back(reading: wiring.Reading) -> Mapping[str, interception.Change]:
    """What one op should read, or the slots that mask and stores should read."""
    if _called(reading) != SLOTS:
        return {reading.op.tap: interception.as_wired}
    return dict.fromkeys(("attention_mask", "store"), _own_slots)


def _own_slots(function: OpFunction, op: Op, tape: Any, config: ModelConfig, p: Leaves, inputs: Any) -> Any:
    given = [tape[name] if name == "slots" else value for name, value in zip(op.inputs, inputs, strict=True)]
    return function(config, p, *given)


def _only_positions(site: DecodeSite) -> bool:
    history = site.once(caches.observed)
    return not _moves(site) and bool(history) and _mask_is_right(site, history[-1])


def inputs_of(*taps: str) -> Callable[[Site], Iterator[Variant]]:
    """Taps computed from what follows from ids, counts and lengths, where nothing more definite was found."""

    def variants(site: Site) -> Iterator[Variant]:
        if (
            not isinstance(site, DecodeSite)
            or not site.op.tap.endswith(taps)
            or _moves(site)
            or caches.narrowness(site)
        ):
            return
        if site.once(found) is None and not _own_inputs(site):
            change = f"with {site.op.tap} computed from what the cache's lengths and the ids say"
            yield Variant(change, interception.cached(site.candidate, {site.op.tap: interception.as_wired}))

    return variants


def _own_inputs(site: DecodeSite) -> bool:
    """The tap is what the op gives on what it should read, so that something else is wrong."""
    history = site.once(caches.observed)
    if not history:
        return True
    values = _values(site, history[-1])
    return wiring.gives(site.candidate, wiring.as_it_should(site.op), values)


def _another_op(site: Site) -> Iterator[Variant]:
    if isinstance(site, DecodeSite):
        changes = {site.op.tap: interception.untouched}
        yield Variant("with the op that was measured alone", interception.cached(site.candidate, changes))


_LENGTHS = "each row's length grows by its own count: forward_cached in jaxgpt/model.py"
_INPUTS = "positions, slots and mask follow from the cache's lengths: cached_inputs in jaxgpt/model.py"
_CACHE = "the cache handed on is what the store ops gave: forward_cached in jaxgpt/model.py"
_TABLE: tuple[tuple[str, str, Callable[[Site], Iterator[Variant]]], ...] = (
    ("cache position not advanced", _LENGTHS, lengths("not")),
    ("padding counted as tokens", _LENGTHS, lengths("padding")),
    ("cache position advanced wrongly", _LENGTHS, lengths("otherwise")),
    ("cache offset off by one", _INPUTS, offset),
    *((name, _INPUTS, rewired(name)) for name in (*wiring.KINDS, wiring.PARAMETERS, wiring.OTHER)),
    ("cache dtype too low", "keep keys and values in the compute dtype: empty in jaxgpt/cache.py", caches.too_narrow),
    ("stale cache slot", _CACHE, caches.handed_on("new", "with the new keys and values kept")),
    ("earlier cache slots overwritten", _CACHE, caches.handed_on("old", "with the earlier keys and values kept")),
    ("cache handed on is not the one read", _CACHE, caches.handed_on("all", "with the keys and values kept")),
    ("wrong ids in cached steps", _INPUTS, inputs_of("embed.tokens")),
    ("wrong positions in cached steps", _INPUTS, inputs_of(*POSITIONS)),
    ("padding or unwritten slots visible", _INPUTS, inputs_of("mask")),
    ("keys and values in the wrong slots", _INPUTS, inputs_of("attn.keys", "attn.values")),
)
REPAIRS: tuple[Repair, ...] = (
    *(Repair(cause, advice, (decode.NAME,), variants) for cause, advice, variants in _TABLE),
    Repair(
        "the cached step runs another op than its own",
        "look for an op that is replaced inside the cached step (jaxgpt/model.py)",
        (decode.NAME,),
        _another_op,
        last_resort=True,
    ),
)
"""Repairs of cached decoding."""
