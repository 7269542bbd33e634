"""Wrong cached steps to plant in tiny models: each a function with the signature of `forward_cached`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxgpt import model, taps
from jaxgpt import ops as true
from jaxgpt.cache import KVCache
from jaxgpt.taps import Op, Wiring

Step = Callable[..., Any]


def is_step(ids: Any) -> bool:
    return ids.shape[1] == 1


def with_ops(**ops: Any) -> Step:
    """A step that runs other ops, by function."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, *, replace: Any = model.UNCHANGED) -> Any:
        return model.forward_cached(c, p, ids, counts, cache, replace={**ops, **replace})

    return step


def with_config(**fields: Any) -> Step:
    """A step with another config."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
        return model.forward_cached(dataclasses.replace(c, **fields), p, ids, counts, cache, **rest)

    return step


def with_values(**changes: Callable[..., Any]) -> Step:
    """A step with other model inputs: functions of (values, ids, counts)."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, *, replace: Any = model.UNCHANGED) -> Any:
        values = model.cached_inputs(c, ids, counts, cache)
        values |= {name: change(values, ids, counts) for name, change in changes.items()}
        return through(taps.ops(c, Wiring(cached=True)), c, p, values, counts, cache, replace)

    return step


def through(table: Any, c: Any, p: Any, values: Any, counts: Any, cache: KVCache, replace: Any) -> Any:
    values = model.run(c, p, table, values, replace=replace)
    keys, stored = (
        tuple(values[f"layers.{i}.attn.{part}"] for i in range(c.num_hidden_layers)) for part in ("keys", "values")
    )
    after = KVCache(keys, stored, cache.lengths + counts)
    return model.Output(values["logits"], {op.tap: values[op.tap] for op in table}), after


def reading(tap: str, wanted: str, read: str) -> Callable[[Op], Op]:
    """The op of `tap` with another input."""

    def change(op: Op) -> Op:
        inputs = tuple(read if name == wanted else name for name in op.inputs)
        return dataclasses.replace(op, inputs=inputs) if op.tap == tap else op

    return change


def rewired(*changes: tuple[str, str, str]) -> Step:
    """A step whose layers read other taps: (tap, wanted, read) below each layer's `attn`."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, *, replace: Any = model.UNCHANGED) -> Any:
        table = taps.ops(c, Wiring(cached=True))
        for i in range(c.num_hidden_layers):
            for change in changes:
                table = tuple(map(reading(*(f"layers.{i}.attn.{name}" for name in change)), table))
        return through(table, c, p, model.cached_inputs(c, ids, counts, cache), counts, cache, replace)

    return step


def handing_on(change: Callable[..., KVCache]) -> Step:
    """A step whose cache is changed before it is handed on: `change(new, old, ids)`."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
        output, new = model.forward_cached(c, p, ids, counts, cache, **rest)
        return output, change(new, cache, ids)

    return step


def given(change: Callable[..., KVCache]) -> Step:
    """A step that is given a changed cache: `change(cache, ids)`."""

    def step(c: Any, p: Any, ids: Any, counts: Any, cache: KVCache, **rest: Any) -> Any:
        output, new = model.forward_cached(c, p, ids, counts, change(cache, ids), **rest)
        return output, new._replace(lengths=cache.lengths + counts)

    return step


def buffers(change: Callable[[Any], Any]) -> Callable[..., KVCache]:
    """A changed cache, buffer by buffer; further arguments are ignored."""

    def changed(cache: KVCache, *_: Any) -> KVCache:
        return cache._replace(keys=tuple(map(change, cache.keys)), values=tuple(map(change, cache.values)))

    return changed


def rounded(dtype: Any) -> Callable[..., KVCache]:
    return buffers(lambda x: x.astype(dtype).astype(x.dtype))


def masked(allowed: Callable[[Any, Any], Any]) -> Step:
    """A step with another mask: `allowed(slots (B, 1, T, 1), key slots (S,))`."""

    def mask(c: Any, p: Any, slots: Any, keys: Any, *segments: Any) -> Any:
        return jnp.broadcast_to(allowed(slots[:, None, :, None], keys), (len(slots), 1, slots.shape[1], len(keys)))

    return with_ops(attention_mask=mask)


def _future(slots: Any, keys: Any) -> Any:
    """Every token of the prompt; padding's slot is that of no key."""
    real = jnp.where(slots < len(keys), slots, -1).max(axis=2, keepdims=True)
    return keys <= real if slots.shape[2] > 1 else keys <= slots


def unscaled(c: Any, p: Any, q: Any, k: Any) -> Any:
    return true.scores(c, p, q, k) * jnp.float32(c.head_dim**0.5)


def theta(value: float) -> Any:
    return lambda c, p, positions: true.angles(dataclasses.replace(c, rope_theta=value), p, positions)


def eps(value: float) -> Any:
    return lambda c, p, x: true.norm(dataclasses.replace(c, rms_norm_eps=value), p, x)


def new_alone(new: KVCache, old: KVCache, ids: Any) -> KVCache:
    return new._replace(values=new.keys)


def grows(cache: KVCache, ids: Any) -> bool:
    return is_step(ids) and cache.slots > 64


BATCH = {
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "first": lambda x: jnp.broadcast_to(x[:1], x.shape),
}
FAULTS: dict[str, tuple[str, Step, str]] = {
    # case: family, step, cause
    "future": ("gpt2 llama", masked(_future), "prefill not causal"),
    "bidirectional with padding": (
        "gpt2",
        masked(lambda q, k: (k <= q) | ((k < q.shape[2]) & (q.shape[2] > 1))),
        "prefill not causal",
    ),
    "blind": ("gpt2 llama", masked(lambda q, k: k < q), "cached token blind to itself"),
    "blind steps": (
        "llama",
        masked(lambda q, k: (k < q) | (q.shape[2] > 1) & (k == q)),
        "cached token blind to itself",
    ),
    "one ahead": ("llama", masked(lambda q, k: k <= q + 1), "causal mask off by one"),
    "unscaled": ("gpt2 llama", with_ops(scores=unscaled), "attention scale missing"),
    "eps": ("llama", with_ops(norm=eps(1e-2)), "norm eps wrong"),
    "theta": ("llama", with_ops(angles=theta(500.0)), "wrong rope theta"),
    "theta config": ("llama", with_config(rope_theta=500.0), "wrong rope theta"),
    "scaling": ("llama", with_config(rope_scaling=None), "rope scaling ignored"),
    "rows handed on": ("gpt2 llama", handing_on(buffers(BATCH["rolled"])), "cache rows mixed up between sequences"),
    "rows taken": ("gpt2 llama", given(buffers(BATCH["rolled"])), "cache rows mixed up between sequences"),
    "first row taken": ("gpt2", given(buffers(BATCH["first"])), "cache rows mixed up between sequences"),
    "rows swapped": (
        "gpt2",
        handing_on(buffers(lambda x: x[jnp.arange(len(x)) ^ 1] if len(x) % 2 == 0 else x.at[:2].set(x[1::-1]))),
        "cache rows mixed up between sequences",
    ),
    "float8": ("gpt2 llama", handing_on(rounded(jnp.float8_e4m3fn)), "cache dtype too low"),
    "bf16": ("gpt2", handing_on(rounded(jnp.bfloat16)), "cache dtype too low"),
    "float8 stored": (
        "gpt2",
        with_ops(
            store=lambda c, p, new, buffer, slots: true.store(
                c, p, new.astype(jnp.float8_e4m3fn).astype(new.dtype), buffer, slots
            )
        ),
        "cache dtype too low",
    ),
    "restart": (
        "gpt2 llama",
        with_values(positions=lambda v, ids, counts: jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)),
        "positions restart in every step",
    ),
    "one position": (
        "gpt2 llama",
        with_values(positions=lambda v, ids, counts: jnp.broadcast_to(v["positions"].max(0), ids.shape)),
        "one position for the whole batch",
    ),
    "padding": (
        "llama",
        with_values(positions=lambda v, ids, counts: v["positions"] + (ids.shape[1] - counts)[:, None]),
        "position ids count the padding",
    ),
    "doubled": (
        "gpt2 llama",
        with_values(positions=lambda v, ids, counts: v["positions"] // 2),
        "wrong positions in cached steps",
    ),
    "growth": (
        "gpt2",
        given(lambda cache, ids: buffers(lambda x: x.at[:, :, 61].set(0))(cache) if grows(cache, ids) else cache),
        "cache slot lost where the cache grows",
    ),
    "ring": (
        "gpt2 llama",
        with_values(
            slots=lambda v, ids, counts: jnp.where(v["slots"] < len(v["key_slots"]), v["slots"] % 16, v["slots"])
        ),
        "cache slots wrapped around",
    ),
    "ring stores": (
        "gpt2",
        with_ops(
            store=lambda c, p, new, buffer, slots: true.store(
                c, p, new, buffer, jnp.where(slots < buffer.shape[2], slots % 16, slots)
            )
        ),
        "cache slots wrapped around",
    ),
    "before rope": ("llama", rewired(("keys", "k_rope", "k_heads")), "keys stored before RoPE"),
    "values of keys": ("gpt2", rewired(("values", "v_heads", "k_heads")), "values replaced by keys"),
    "keys handed on as values": ("gpt2", handing_on(new_alone), "values replaced by keys"),
}
