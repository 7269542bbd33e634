"""Repairs of cached decoding: the step is a black box that is given another cache, or whose cache is put right.

Which of them apply is read off the candidate's own calls: how its lengths move, what
its first wrong tap was computed from, and in which slots the cache that it hands on
differs from the one that its attention read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op
from oracle import model_inputs
from oracle.repairs import interception, table_rows, wiring
from oracle.repairs.decode import caches, step_inputs, step_masks, step_ops
from oracle.repairs.readings import Reading
from oracle.repairs.repair import Repair, Variant
from oracle.results import layer_of
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
                _OFFSET.format("later" if by < 0 else "earlier"),
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
    given = model_inputs.of_step(site.candidate.config, jnp.asarray(call.ids), jnp.asarray(call.counts), call.before)
    right = np.asarray(given["key_slots"])[None, None] <= np.asarray(given["slots"])[:, :, None]
    mask, real = np.asarray(call.taps["mask"])[:, 0], np.arange(call.ids.shape[1]) < call.counts[:, None]
    return mask.shape == right.shape and bool(np.array_equal(mask[real], right[real]))


# -- What an op was computed from ------------------------------------------------------


def rewired(named: str) -> Callable[[Site], Iterator[Variant]]:
    """The op computed from what the table says, in every call."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, DecodeSite) or (site.op.tap in POSITIONS and not _only_positions(site)):
            return
        reading = site.once(step_inputs.found)
        if reading is None:
            yield from _corrected_store(site, named)
        elif _called(reading) == named and not (site.op.tap == "mask" and site.once(step_masks.stores_are_right)):
            yield Variant(str(reading), interception.cached(site.candidate, _given_back(reading)))

    return variants


def _corrected_store(site: DecodeSite, named: str) -> Iterator[Variant]:
    """A row of the table that only cached steps have: what is stored is another tap of the layer."""
    history = site.once(caches.observed)
    if site.op.function != "store" or not history or not site.once(step_inputs.own):
        return
    own, *others = site.op.inputs
    shape, layer = history[-1].taps[own].shape, layer_of(own)
    for tap, array in history[-1].taps.items():
        if tap != own and layer_of(tap) == layer and array.shape == shape:
            row = Reading(replace(site.op, inputs=(tap, *others)), site.op.inputs, "")
            if _called(row) == named:
                yield Variant(str(row), table_rows.corrected_step(site.candidate, row), table_rows.advice(row))


SLOTS, WRAPPED = "cache slot off by one", "cache slots wrapped around"
READS = {
    "slots wrapped around": WRAPPED,
    "positions of the longest row": "one position for the whole batch",
    "positions from zero in this step": "positions restart in every step",
}
"""What only a cached step may read."""


def _called(reading: Reading) -> str:
    for wanted, read in zip(reading.op.inputs, reading.inputs, strict=True):
        named = next((name for start, name in READS.items() if read.startswith(start)), "")
        if named:
            return named
        if reading.op.function == "store" and wanted.endswith("v_heads") and ".attn.k_" in read:
            return caches.KEYS_FOR_VALUES
    name = wiring.cause(reading)
    # The mask is the first to read the slots; the stores come after it.
    return SLOTS if name == "causal mask off by one" else name


def _given_back(reading: Reading) -> Mapping[str, interception.Change]:
    """What one op should read, or the slots that mask and stores should read."""
    if reading.op.tap == "mask":
        return dict.fromkeys(("attention_mask", "store"), _own_slots)
    return {reading.op.tap: interception.as_wired}


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
            isinstance(site, DecodeSite)
            and site.op.tap.endswith(taps)
            and not (_moves(site) or caches.narrowness(site) or site.once(caches.misread))
            and site.once(step_inputs.found) is None
            and not site.once(step_inputs.own)
        ):
            change = f"with {site.op.tap} computed from what the cache's lengths and the ids say"
            yield Variant(change, interception.cached(site.candidate, {_key(site): interception.as_wired}))

    return variants


def _key(site: DecodeSite) -> str:
    """By tap, but for the one that has the name of another op's function."""
    return "attention_mask" if site.op.tap == "mask" else site.op.tap


def _wrong_mask(site: Site) -> Iterator[Variant]:
    if isinstance(site, DecodeSite) and site.once(step_masks.seen) is None:
        yield from inputs_of("mask")(site)


def _other_positions(site: Site) -> Iterator[Variant]:
    """Only where the tap is that of other integers: a wrong angle is no wrong position."""
    if isinstance(site, DecodeSite) and site.once(step_inputs.other_positions):
        yield from inputs_of(*POSITIONS)(site)


def _another_op(site: Site) -> Iterator[Variant]:
    if isinstance(site, DecodeSite):
        changes = {site.op.tap: interception.untouched}
        yield Variant("with the op that was measured alone", interception.cached(site.candidate, changes))


_LENGTHS = "each row's length grows by its own count: forward_cached in jaxgpt/model.py"
_INPUTS = "positions, slots and mask follow from the cache's lengths: cached_inputs in jaxgpt/model.py"
_OFFSET = (
    "a new token's position and slot must be its row's length, not one {}: slots and positions of cached_inputs "
    "in jaxgpt/model.py"
)
_CACHE = "the cache handed on is what the store ops gave: forward_cached in jaxgpt/model.py"
_GIVEN = "every row is continued from its own, whole cache: the store ops of forward_cached in jaxgpt/model.py"
_GROWTH = "a larger cache holds what the smaller one held: grown in jaxgpt/cache.py"
_TABLE: tuple[tuple[str, str, Callable[[Site], Iterator[Variant]]], ...] = (
    ("cache position not advanced", _LENGTHS, lengths("not")),
    ("padding counted as tokens", _LENGTHS, lengths("padding")),
    ("cache position advanced wrongly", _LENGTHS, lengths("otherwise")),
    ("cache offset off by one", _INPUTS, offset),
    *((name, _INPUTS, rewired(name)) for name in (*READS.values(), caches.KEYS_FOR_VALUES)),
    *((name, _INPUTS, rewired(name)) for name in (*wiring.KINDS, wiring.PARAMETERS, wiring.OTHER)),
    ("cache dtype too low", "keep keys and values in the compute dtype: empty in jaxgpt/cache.py", caches.too_narrow),
    (caches.ROWS, _CACHE, caches.exchanged(caches.ROWS)),
    (caches.ROWS, _GIVEN, caches.reread(caches.ROWS)),
    (caches.KEYS_FOR_VALUES, _CACHE, caches.exchanged(caches.KEYS_FOR_VALUES)),
    (caches.LOST_IN_GROWTH, _GROWTH, caches.reread(caches.LOST_IN_GROWTH)),
    (caches.OVERWRITTEN, _GIVEN, caches.reread(caches.OVERWRITTEN)),
    ("stale cache slot", _CACHE, caches.handed_on("new", "with the new keys and values kept")),
    ("earlier cache slots overwritten", _CACHE, caches.handed_on("old", "with the earlier keys and values kept")),
    ("cache handed on is not the one read", _CACHE, caches.handed_on("all", "with the keys and values kept")),
    ("wrong ids in cached steps", _INPUTS, inputs_of("embed.tokens")),
    ("wrong positions in cached steps", _INPUTS, _other_positions),
    ("wrong mask in cached steps", _INPUTS, _wrong_mask),
    ("keys and values stored wrongly in cached steps", _INPUTS, inputs_of("attn.keys", "attn.values")),
)
REPAIRS: tuple[Repair, ...] = (
    *step_masks.REPAIRS,
    *step_ops.REPAIRS,
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
