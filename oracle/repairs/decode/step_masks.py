"""Repairs of the mask of cached steps: its pattern is recognised, and the entries turned in which it is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from oracle import model_inputs
from oracle.candidate import Candidate
from oracle.repairs.decode import caches, step_inputs
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import decode
from oracle.rungs.decode_site import Call, DecodeSite
from oracle.site import Site


@dataclass(frozen=True)
class Places:
    """Where queries and keys of a call are."""

    query: Any
    """(B, T, 1): the slot of each token."""
    key: Any
    """(S,)"""
    start: Any
    """(B, 1, 1): the slot of the call's first token."""
    end: Any
    """(B, 1, 1): the slot behind its last real token."""
    width: int
    """T."""
    window: float
    """How many tokens each sees; infinite for all before it."""

    @property
    def near(self) -> Any:
        """Keys that are not before the query's window."""
        return self.key > self.query - self.window

    @property
    def right(self) -> Any:
        """Each token sees itself and what came before, in its window."""
        return (self.key <= self.query) & self.near

    @property
    def longest(self) -> Any:
        """(1, T, 1): the slot of each token of the longest row."""
        return jnp.where(self.query < self.key.shape[0], self.query, -1).max(axis=0, keepdims=True)


Pattern = Callable[[Places], Any]
BLIND, AHEAD, FUTURE, PADDING, BEFORE = (
    "cached token blind to itself",
    "causal mask off by one",
    "prefill not causal",
    "padding or unwritten slots visible",
    "sliding window ignored",
)
PATTERNS: tuple[tuple[str, str, Pattern], ...] = (
    (BLIND, "with each token itself visible", lambda at: (at.key < at.query) & at.near),
    (AHEAD, "with the next slot hidden", lambda at: (at.key <= at.query + 1) & at.near),
    (BEFORE, "with tokens before the window hidden", lambda at: at.key <= at.query),
    (FUTURE, "with later tokens of the prompt hidden", lambda at: at.right | (at.key < at.end) & at.near),
    (
        FUTURE,
        "with later tokens of the prompt, and its padding, hidden",
        lambda at: at.right | (at.key < at.start + at.width) & (at.width > 1) & at.near,
    ),
    (FUTURE, "with all but earlier tokens hidden", lambda at: at.right | (at.width > 1) & at.near),
    (PADDING, "with unwritten slots hidden", lambda at: at.right | (at.key >= at.end)),
    (PADDING, "with the padding of the batch hidden", lambda at: at.right | (at.key <= at.longest) & at.near),
    (PADDING, "with all but earlier tokens hidden", lambda at: at.right | True),
)
"""Wrong masks, (B, T, S): the cause, what undoes them, and how they come about."""


def places(config: ModelConfig, ids: Any, counts: Any, cache: KVCache) -> Places:
    """Of one call."""
    given, start = model_inputs.of_step(config, ids, counts, cache), cache.lengths[:, None, None]
    window = jnp.inf if config.sliding_window is None else config.sliding_window
    end = start + counts[:, None, None]
    return Places(given["slots"][..., None], given["key_slots"], start, end, ids.shape[1], window)


def fits(site: DecodeSite, call: Call, pattern: Pattern) -> bool:
    """The mask of the call's real tokens is that."""
    at = places(site.candidate.config, jnp.asarray(call.ids), jnp.asarray(call.counts), call.before)
    mask, real = np.asarray(call.taps["mask"])[:, 0], np.arange(at.width) < call.counts[:, None]
    wrong = np.broadcast_to(np.asarray(pattern(at)), mask.shape) if mask.ndim == 3 else mask
    return wrong.shape == np.asarray(at.right).shape and bool(np.array_equal(mask[real], wrong[real]))


def seen(site: DecodeSite) -> tuple[str, str, Pattern] | None:
    """The first pattern of the table that the mask has where it first differs, and in the next step if it can be."""
    history = site.once(caches.observed)
    if site.op.tap != "mask" or not history or fits(site, history[-1], lambda at: at.right):
        return None
    found = [row for row in PATTERNS if fits(site, history[-1], row[2])]
    following = site.once(caches.following)
    # In a prefill several are alike.
    going_on = [row for row in found if following is not None and fits(site, following, row[2])]
    return next(iter(going_on or found), None)


def stores_are_right(site: DecodeSite) -> bool:
    """New keys are where they belong, so that the slots are not what is wrong."""
    history = site.once(caches.observed)
    return bool(history) and step_inputs.stores_as_alone(site.candidate, history[-1])


def _named(cause: str) -> Callable[[Site], Iterator[Variant]]:
    def variants(site: Site) -> Iterator[Variant]:
        found = site.once(seen) if isinstance(site, DecodeSite) else None
        if isinstance(site, DecodeSite) and found and found[0] == cause and site.once(stores_are_right):
            when, only = caches.wrong_in(site, lambda call: fits(site, call, found[2]))
            yield Variant(f"{found[1]} {when}".rstrip(), _turned(site.candidate, found[2], only))

    return variants


def _turned(candidate: Candidate, pattern: Pattern, only: Callable[[int], bool]) -> Candidate:
    inner = candidate.step

    def step(config: ModelConfig, params: Any, ids: Any, counts: Any, cache: KVCache, **given: Any) -> Any:
        if not only(ids.shape[1]):
            return inner(config, params, ids, counts, cache, **given)
        at = places(config, ids, counts, cache)
        output, _ = inner(config, params, ids, counts, cache, **given)
        mask = output.taps["mask"] ^ (at.right ^ pattern(at))[:, None]
        given["replace"] = {**given.get("replace", {}), "attention_mask": lambda *_: mask}
        return inner(config, params, ids, counts, cache, **given)

    return replace(candidate, step=step)


_ADVICE = "slots and mask follow from the cache's lengths: cached_inputs in jaxgpt/model.py, attention_mask in its ops"
REPAIRS: tuple[Repair, ...] = tuple(
    Repair(cause, _ADVICE, (decode.NAME,), _named(cause)) for cause in (BLIND, AHEAD, FUTURE, PADDING, BEFORE)
)
"""By the pattern of the mask."""
