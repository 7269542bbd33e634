"""Repairs of what a cached step hands on: keys and values that lost digits, or that are not those attention read."""

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
from oracle.candidate import Candidate, Unrunnable
from oracle.repairs import interception
from oracle.repairs.repair import Variant
from oracle.rungs.decode_site import Call, DecodeSite, calls
from oracle.site import Site

Before = Callable[[KVCache, Any], KVCache]
"""(cache, counts) to the cache that the step is given instead."""
After = Callable[[KVCache, KVCache, Any, Mapping[str, Any], Any], KVCache]
"""(cache after, cache before, counts, taps, slots written) to the cache that is handed on instead."""


def observed(site: DecodeSite) -> list[Call]:
    """The candidate's own calls up to the step that differs; none if it cannot run."""
    try:
        return list(calls(site.candidate, site.forced, site.last))
    except Unrunnable:
        return []


Only = tuple[str, Callable[[int], bool]]
"""In which calls of a step something is wrong: in words, and by the number of ids they are given."""
IN_STEPS: Only = ("in steps of one token", lambda width: width == 1)
IN_PREFILLS: Only = ("in the prefill", lambda width: width > 1)
EVERYWHERE: Only = ("", lambda width: True)


def wrong_in(site: DecodeSite, wrong: Callable[[Call], bool]) -> Only:
    """In steps alone if the prefill was right; else also in steps if the next one is wrong."""
    if site.last:
        return IN_STEPS
    further = site.once(following)
    return EVERYWHERE if further is None or wrong(further) else IN_PREFILLS


def following(site: DecodeSite) -> Call | None:
    """The step behind the one that differs, if there is one."""
    if site.last >= len(site.forced.ids):
        return None
    try:
        *_, call = calls(site.candidate, site.forced, site.last + 1)
    except Unrunnable:
        return None
    return call


def around(candidate: Candidate, before: Before, after: After) -> Candidate:
    """The candidate with a step that is given another cache, or hands on another."""
    inner = candidate.step

    def step(config: ModelConfig, params: Any, ids: Any, counts: Any, cache: KVCache, **given: Any) -> Any:
        output, new = inner(config, params, ids, counts, before(cache, ids), **given)
        slots = model_inputs.of_step(config, ids, counts, cache)["slots"]
        return output, after(new, cache, counts, output.taps, slots)

    return replace(candidate, step=step)


def as_given(cache: KVCache, ids: Any) -> KVCache:
    """Nothing else is given."""
    return cache


def advanced(new: KVCache, old: KVCache, counts: Any, taps: Mapping[str, Any], slots: Any) -> KVCache:
    """Longer by what was given."""
    return new._replace(lengths=old.lengths + counts)


# -- What the cache holds --------------------------------------------------------------

NARROW = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16")
"""Dtypes of caches, the narrowest first."""


def narrowness(site: DecodeSite) -> str:
    """The dtype in which all earlier keys that attention read can be written, narrower than the candidate's."""
    history, tap = site.once(observed), site.op.tap
    if site.op.function != "store" or not history:
        return ""
    # A step may round what it hands on, or what it writes.
    lengths = np.asarray(history[-1].before.lengths) if site.last else history[-1].counts
    keys = np.asarray(history[-1].taps[tap].astype(jnp.float32))
    earlier = np.concatenate([keys[row, :, : lengths[row]].ravel() for row in range(len(lengths))])
    for name in NARROW:
        with np.errstate(over="ignore"):
            same = np.array_equal(earlier.astype(jnp.dtype(name)).astype(np.float32), earlier)
        if same and _is_narrower(name, site.candidate.dtype) and earlier.any():
            return name
    return ""


def _is_narrower(name: str, dtype: str) -> bool:
    """Digits and all: what bfloat16 holds, float16 often holds too."""
    return jnp.finfo(name).bits < jnp.finfo(dtype).bits


def too_narrow(site: Site) -> Iterator[Variant]:
    """Digits given back to keys and values that lost them on the way from one step to the next."""
    if not isinstance(site, DecodeSite) or not (name := narrowness(site)):
        return
    changes = {"store": _digits(name)}
    listening = interception.cached(site.candidate, changes)

    def after(new: KVCache, old: KVCache, counts: Any, taps: Mapping[str, Any], slots: Any) -> KVCache:
        return _buffers(new, taps, lambda kept, read: _restored(kept, read, name))

    yield Variant(f"with the cache in {site.candidate.dtype}, not {name}", around(listening, as_given, after))


def _digits(name: str) -> interception.Change:
    def change(function: OpFunction, op: Op, tape: Any, config: ModelConfig, p: Leaves, inputs: Any) -> Any:
        new, buffer = (
            _restored(given, tape[read], name) for given, read in zip(inputs[:2], op.inputs[:2], strict=True)
        )
        return function(config, p, new, buffer, inputs[2])

    return change


def _restored(kept: Any, exact: Any, name: str) -> Any:
    """The exact value wherever what was kept is that value, rounded."""
    rounded = exact.astype(name).astype(jnp.float32)
    return jnp.where(kept.astype(name).astype(jnp.float32) == rounded, exact, kept.astype(exact.dtype))


def _buffers(cache: KVCache, taps: Mapping[str, Any], change: Callable[[Any, Any], Any]) -> KVCache:
    """Every buffer changed, given what attention read in the same layer."""
    keys = [change(kept, taps[f"layers.{i}.attn.keys"]) for i, kept in enumerate(cache.keys)]
    values = [change(kept, taps[f"layers.{i}.attn.values"]) for i, kept in enumerate(cache.values)]
    return cache._replace(keys=tuple(keys), values=tuple(values))


def _lost(site: DecodeSite) -> str:
    """What differs between the cache that attention read and the one handed on.

    `new`: the latest tokens' slots, which are as before; `old`: earlier tokens' slots
    alone; `all`: anything else.
    """
    for call in site.once(observed)[:-1]:
        lengths = np.asarray(call.before.lengths)[:, None]
        numbers, ends = np.arange(call.before.slots), lengths + call.counts[:, None]
        for layer in range(len(call.after.keys)):
            for part in ("keys", "values"):
                before, after = (np.asarray(getattr(cache, part)[layer]) for cache in (call.before, call.after))
                read = np.asarray(call.taps[f"layers.{layer}.attn.{part}"])
                if not before.shape == after.shape == read.shape:
                    return ""
                differs = (after != read).any(axis=(1, 3)) & (numbers < ends)
                if not differs.any():
                    continue
                if not (differs & (numbers >= lengths)).any():
                    return "old"
                stays = not ((after != before).any(axis=(1, 3)) & differs).any()
                latest = bool(differs[np.arange(len(ends)), ends[:, 0] - 1].all())
                return "new" if stays and latest and not (differs & (numbers < lengths)).any() else "all"
    return ""


def handed_on(which: str, change: str) -> Callable[[Site], Iterator[Variant]]:
    """The slots in question as attention read them."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, DecodeSite) and _lost(site) == which and not (narrowness(site) or mixed_up(site)):
            yield Variant(change, around(site.candidate, as_given, _kept(which)))

    return variants


def _kept(which: str) -> After:
    def after(new: KVCache, old: KVCache, counts: Any, taps: Mapping[str, Any], slots: Any) -> KVCache:
        numbers = jnp.arange(new.slots)
        written = (slots[..., None] == numbers).any(axis=1)  # (B, S)
        before = numbers < old.lengths[:, None]
        where = {"new": written, "old": before, "all": written | before}[which][:, None, :, None]
        return _buffers(new, taps, lambda kept, read: jnp.where(where, read, kept))

    return after


# -- Rows and parts that changed places -------------------------------------------------

KEYS_FOR_VALUES = "values replaced by keys"
ROWS = "cache rows mixed up between sequences"


def mixed_up(site: DecodeSite) -> str:
    """What the cache that was handed on holds in place of its own values, or nothing that has a name."""
    for call in site.once(observed)[:-1]:
        ends = np.asarray(call.before.lengths) + call.counts
        for layer in range(len(call.after.keys)):
            keys, values = (np.asarray(call.taps[f"layers.{layer}.attn.{part}"]) for part in ("keys", "values"))
            if _others_rows(np.asarray(call.after.keys[layer]), keys, ends):
                return ROWS
            after = np.asarray(call.after.values[layer])
            if _others_rows(after, values, ends):
                return ROWS
            if after.shape == keys.shape and not np.array_equal(after, values) and np.array_equal(after, keys):
                return KEYS_FOR_VALUES
    return ""


def _others_rows(ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray) -> bool:
    """Every row is one of theirs, as far as it is written, and some are not their own."""
    if ours.shape != theirs.shape:
        return False

    def held(row: int) -> list[int]:
        part = ours[row, :, : lengths[row]]
        return [other for other in range(len(theirs)) if np.array_equal(part, theirs[other, :, : lengths[row]])]

    found = [held(row) for row in range(len(ours)) if lengths[row]]
    own = [row in others for row, others in enumerate(found)]
    return len(found) == len(ours) and all(found) and not all(own)


def exchanged(cause: str) -> Callable[[Site], Iterator[Variant]]:
    """Each row, and each part, as attention read it."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, DecodeSite) and mixed_up(site) == cause:
            yield Variant("with each row's own keys and values kept", around(site.candidate, as_given, _kept("all")))

    return variants


# -- What attention read of an earlier cache ----------------------------------------------

LOST_IN_GROWTH = "cache slot lost where the cache grows"
OVERWRITTEN = "earlier cache slots overwritten"


def misread(site: DecodeSite) -> str:
    """How the earlier slots that attention read differ from those of the cache that the step was given."""
    history = site.once(observed)
    if site.op.function != "store" or not history or not site.last or narrowness(site):
        return ""
    call, (_, layer, _, part) = history[-1], site.op.tap.split(".")
    read, before = np.asarray(call.taps[site.op.tap]), np.asarray(getattr(call.before, part)[int(layer)])
    if read.shape != before.shape:
        return ""
    lengths = np.asarray(call.before.lengths)
    earlier = np.arange(read.shape[2]) < lengths[:, None]
    differs = (read != before).any(axis=(1, 3)) & earlier
    if not differs.any():
        return ""
    if _others_rows(read, before, lengths):
        return ROWS
    if differs.sum() * 2 > earlier.sum():
        return ""
    return LOST_IN_GROWTH if call.before.slots > history[-2].before.slots else OVERWRITTEN


def reread(cause: str) -> Callable[[Site], Iterator[Variant]]:
    """Earlier slots from the cache that the step is given."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, DecodeSite) and site.once(misread) == cause:
            change = "with earlier keys and values as the step is given them"
            yield Variant(change, interception.cached(site.candidate, {"store": _given_buffer}))

    return variants


def _given_buffer(function: OpFunction, op: Op, tape: Any, config: ModelConfig, p: Leaves, inputs: Any) -> Any:
    new, _, slots = inputs
    return function(config, p, new, tape[op.inputs[1]], slots)
