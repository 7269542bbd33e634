"""Repairs of what a cached step hands on: keys and values that lost digits, or that are not those attention read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import Leaves, OpFunction
from jaxgpt.taps import Op
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


def around(candidate: Candidate, before: Before, after: After) -> Candidate:
    """The candidate with a step that is given another cache, or hands on another."""
    inner = candidate.step

    def step(config: ModelConfig, params: Any, ids: Any, counts: Any, cache: KVCache, **given: Any) -> Any:
        output, new = inner(config, params, ids, counts, before(cache, ids), **given)
        slots = model.cached_inputs(config, ids, counts, cache)["slots"]
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
    if site.op.function != "store" or not history or not site.last:
        return ""
    lengths = np.asarray(history[-1].before.lengths)
    keys = np.asarray(history[-1].taps[tap].astype(jnp.float32))
    earlier = np.concatenate([keys[row, :, : lengths[row]].ravel() for row in range(len(lengths))])
    for name in NARROW:
        same = np.array_equal(earlier.astype(jnp.dtype(name)).astype(np.float32), earlier)
        if same and name != site.candidate.dtype and earlier.any():
            return name
    return ""


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
        if isinstance(site, DecodeSite) and not narrowness(site) and _lost(site) == which:
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
