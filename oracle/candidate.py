"""The model under test: a config, its parameters, and how its ops and decoding run.

Everything a fault can be planted in is a field, so that tests and the measured
fault catalogue can put a wrong parameter, a wrong op or a wrong decode step into an
otherwise true model, in memory.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import cache as kv
from jaxgpt import generate, model
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.ops import FUNCTIONS, OpFunction
from jaxgpt.settings import GenerationSettings
from jaxgpt.taps import Op, Wiring, ops
from oracle import memory
from oracle.text import Text
from oracle.training import Training

Step = Callable[..., tuple[model.Output, KVCache]]
"""Signature of `jaxgpt.model.forward_cached`."""


@dataclass(frozen=True, eq=False)
class CalledBack:
    """An op that another program computes: no gradient goes through it."""

    function: OpFunction

    def __call__(self, *given: Any) -> Any:
        """The op's output."""
        return self.function(*given)


@dataclass(frozen=True)
class Replaced:
    """A forward pass with some ops replaced, as one function; equal ones share their compilations."""

    forward_pass: model.ForwardPass
    replace: "Replacements"

    def __call__(self, *given: Any, **further: Any) -> model.Output:
        """See `jaxgpt.model.forward`."""
        return self.forward_pass(*given, **further, replace=dict(self.replace))


class Unrunnable(Exception):
    """The candidate's parameters or inputs do not fit its ops: a fault of the candidate, not of the oracle."""


@contextmanager
def unrunnable(what: str) -> Generator[None, None, None]:
    """What does not fit together in the candidate is raised as `Unrunnable`, in one line."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise Unrunnable(f"the {what} cannot run: {str(error).strip().splitlines()[0]}") from error


@dataclass(frozen=True)
class Candidate:
    """A JAX model as it would be used."""

    config: ModelConfig
    stored: Mapping[str, Any]
    """Parameters as the checkpoint stores them."""
    dtype: str
    """Compute dtype: `float32` or `bfloat16`."""
    replace: Mapping[str, OpFunction] = field(default_factory=lambda: model.UNCHANGED)
    """Ops to run instead of the model's own, by tap or by function."""
    forward_pass: model.ForwardPass = model.forward
    """One forward of whole sequences."""
    step: Step = model.forward_cached
    """One cached forward: prefill, or a decode step."""
    real_ids: int | None = None
    """Ids from here on are padding of the vocabulary; None if all are real."""
    text: Text | None = None
    """Tokenizer and template; None for a model of ids only."""
    training: Training = field(default_factory=Training)
    """How it trains."""

    @cached_property
    def params(self) -> dict[str, jax.Array]:
        """Parameters in the compute dtype."""
        return model.cast({name: jnp.asarray(array) for name, array in self.stored.items()}, self.dtype)

    @property
    def is_altered(self) -> bool:
        """An op or the decode step is not the model's own."""
        return bool(self.replace) or self.step is not model.forward_cached

    @property
    def runs_otherwise(self) -> bool:
        """A forward of whole sequences is not the model's own."""
        return bool(self.replace) or self.forward_pass is not model.forward

    def function(self, op: Op) -> OpFunction:
        """What computes an op here."""
        return self.replace.get(op.tap) or self.replace.get(op.function) or FUNCTIONS[op.function]

    @property
    def _replacements(self) -> "Replacements":
        return tuple(sorted(self.replace.items(), key=lambda item: item[0]))

    def trained_as_run(self) -> "Candidate":
        """The candidate whose product's own training functions differentiate the forward pass that it runs."""
        forward = Replaced(self.forward_pass, self._replacements)
        return replace(self, training=self.training.differentiating(forward))

    @property
    def has_no_gradient(self) -> bool:
        """An op of the forward pass is called back from another program."""
        return any(isinstance(function, CalledBack) for function in self.replace.values())

    def forward(self, ids: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> dict[str, jax.Array]:
        """All taps of one free-running forward, in execution order.

        Raises:
            Unrunnable: shapes that do not fit together, or a tap that is not there.
        """
        given = (self.params, *map(jnp.asarray, (ids, positions, segments)))
        memory.release()  # all taps come at once
        with unrunnable("forward"):
            taps = _forward(self.config, self._replacements, self.forward_pass, *given)
        return _in_order(taps, ops(self.config), "forward")

    def run_op(self, op: Op, inputs: Sequence[np.ndarray]) -> jax.Array:
        """One op with this model's parameters on given inputs.

        Raises:
            Unrunnable: shapes that do not fit together.
        """
        parameters = model.leaves(self.params, op.parameters) if op.parameters else {}
        with unrunnable("op"):
            return _jitted(self.function(op))(self.config, parameters, *map(jnp.asarray, inputs))

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with room for `slots` tokens a row."""
        return kv.empty(self.config, batch, kv.bucket(slots), self.dtype)

    def grown_cache(self, cache: KVCache, slots: int) -> KVCache:
        """The cache with room for `slots` tokens a row, as generation makes it grow."""
        return kv.grown(cache, kv.bucket(slots))

    def advance(self, ids: np.ndarray, counts: np.ndarray, cache: KVCache) -> tuple[dict[str, jax.Array], KVCache]:
        """All taps of one cached forward, and the cache after it.

        Raises:
            Unrunnable: shapes that do not fit together, or a tap that is not there.
        """
        given = (self.params, jnp.asarray(ids), jnp.asarray(counts), cache)
        memory.release()
        with unrunnable("cached forward"):
            taps, cache = _advance(self.config, self._replacements, self.step, *given)
        return _in_order(taps, ops(self.config, Wiring(cached=True)), "cached forward"), cache

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> list[list[int]]:
        """Each prompt's most likely continuation: through the real generator unless the model is altered.

        Raises:
            Unrunnable: the generator refused, for example because logits are NaN.
        """
        memory.release()
        if self.is_altered:
            return self._greedy_by_steps(prompts, new_tokens)
        real = self.config.vocab_size if self.real_ids is None else self.real_ids
        generator = generate.Generator(
            self.config, self.params, real_ids=real, stop_ids=(), dtype=jnp.dtype(self.dtype)
        )
        rows = [generate.Row(list(ids), count, 0) for ids, count in zip(prompts, new_tokens, strict=True)]
        tokens: list[list[int]] = [[] for _ in rows]
        with unrunnable("generator"):
            for chunk in generator.stream(rows, GenerationSettings(temperature=0.0)):
                for row, new in zip(tokens, chunk, strict=True):
                    row.extend(new)
        return tokens

    def _greedy_by_steps(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> list[list[int]]:
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        ids = right_padded(prompts)
        cache = self.empty_cache(len(prompts), int((counts + np.array(new_tokens)).max()))
        tokens: list[list[int]] = [[] for _ in prompts]
        for _ in range(max(new_tokens)):
            taps, cache = self.advance(ids, counts, cache)
            last = np.asarray(taps["logits"])[np.arange(len(prompts)), counts - 1, : self.real_ids]
            ids, counts = last.argmax(-1).astype(np.int32)[:, None], np.ones_like(counts)
            for row, new in zip(tokens, ids[:, 0], strict=True):
                row.append(int(new))
        return [row[:count] for row, count in zip(tokens, new_tokens, strict=True)]


def _in_order(taps: Mapping[str, jax.Array], table: Sequence[Op], what: str) -> dict[str, jax.Array]:
    """The output of a jitted function is a sorted dict; order is that of the table."""
    lacking = next((op.tap for op in table if op.tap not in taps), None)
    if lacking is not None:
        raise Unrunnable(f"the {what} has no tap {lacking}")
    return {op.tap: taps[op.tap] for op in table}


Replacements = tuple[tuple[str, OpFunction], ...]
"""`Candidate.replace` as a static argument: models of one config share their compilations."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    config: ModelConfig,
    replace: Replacements,
    forward_pass: model.ForwardPass,
    params: model.Params,
    ids: Any,
    positions: Any,
    segments: Any,
) -> dict[str, jax.Array]:
    given: dict[str, Any] = {"positions": positions, "segments": segments, "replace": dict(replace)}
    return forward_pass(config, params, ids, **given).taps


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    config: ModelConfig, replace: Replacements, step: Step, params: model.Params, ids: Any, counts: Any, cache: KVCache
) -> tuple[dict[str, jax.Array], KVCache]:
    output, cache = step(config, params, ids, counts, cache, replace=dict(replace))
    return output.taps, cache


@cache
def _jitted(function: OpFunction) -> Callable[..., jax.Array]:
    # One compilation per op function and shape: layers share it.
    return jax.jit(function, static_argnums=0)


def right_padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as one int32 array, zeros after each row's end."""
    width = max(len(row) for row in rows)
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
