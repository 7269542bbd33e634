"""Generation: prefill and a decode loop on the device, streamed back in chunks.

Two jitted functions, `prefill` and `decode`, take the whole state and give it back
(donated, so the cache is updated in place). Everything that varies between calls
is a run-time value or a power-of-two bucket, so after warm-up nothing compiles.
Every sampled token is also stored, so the cache always holds exactly the prompt
and what was generated; forgetting the tail is setting a smaller length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt import cache as kv
from jaxgpt import model, sampling
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.settings import GenerationSettings

CHUNK = 32
"""Most decode steps between two reads by the host."""
MINIMUM_PREFILL = 16
"""Smallest prompt bucket."""


class State(NamedTuple):
    """A batch in the middle of generation."""

    cache: KVCache
    logits: Float[Array, "B V"]
    """Of the last stored token: what the next id is drawn from."""
    done: Bool[Array, "B"]
    budget: Int[Array, "B"]
    """Tokens each row may still generate."""
    broken: Bool[Array, "B"]
    """The row's logits were NaN or infinite."""


class Vocabulary(NamedTuple):
    """What the decode loop must know of the tokenizer."""

    sampleable: Bool[Array, "V"]
    """False for padded rows of the embedding, which must never be generated."""
    stops: Bool[Array, "V"]
    """True for ids that end a row."""


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: ModelConfig, params: model.Params, cache: KVCache, ids: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Store the first `counts[b]` of `ids[b]`; logits of each row's last token."""
    output, cache = model.forward_cached(config, params, ids, counts, cache, last_only=True)
    return output.logits[:, 0], cache


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: ModelConfig,
    params: model.Params,
    state: State,
    knobs: sampling.Knobs,
    vocabulary: Vocabulary,
    steps: Int[Array, ""],
) -> tuple[State, Int[Array, "B C"]]:
    """Up to `steps` (at most CHUNK) sample-and-store steps; ids, -1 where a row was done."""

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        return (step < steps) & ~state.done.all()

    def advance(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, ids = carry
        state, new = _step(config, params, state, knobs, vocabulary)
        return step + 1, state, ids.at[:, step].set(new)

    ids = jnp.full((state.done.shape[0], CHUNK), -1, jnp.int32)
    _, state, ids = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, ids))
    return state, ids


def _step(
    config: ModelConfig, params: model.Params, state: State, knobs: sampling.Knobs, vocabulary: Vocabulary
) -> tuple[State, Int[Array, "B"]]:
    live = ~state.done
    ids = sampling.sample(state.logits, vocabulary.sampleable, knobs, state.cache.lengths)
    counts = live.astype(jnp.int32)
    output, cache = model.forward_cached(config, params, ids[:, None], counts, state.cache)
    budget = state.budget - counts
    # A NaN would otherwise be sampled as id 0, as if nothing had happened.
    broken = state.broken | (live & ~jnp.isfinite(state.logits.max(axis=-1)))
    done = state.done | vocabulary.stops[ids] | (budget <= 0) | broken
    return State(cache, output.logits[:, 0], done, budget, broken), jnp.where(live, ids, -1)


@dataclass(frozen=True)
class Row:
    """One sequence to continue."""

    ids: Sequence[int]
    max_new_tokens: int
    seed: int


class Generator:
    """Generation with one model: params in the compute dtype, and the ids it may and must stop at."""

    def __init__(
        self, config: ModelConfig, params: model.Params, *, real_ids: int, stop_ids: Sequence[int], dtype: Any
    ):
        """`real_ids`: ids from here on are padding of the embedding and are never sampled."""
        self.config = config
        self.params = params
        self.dtype = dtype
        ids = np.arange(config.vocab_size)
        self.vocabulary = Vocabulary(jnp.asarray(ids < real_ids), jnp.asarray(np.isin(ids, list(stop_ids))))
        self.stop_ids = frozenset(stop_ids)

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse, before anything runs, what could only fail or be wrong later.

        Raises:
            InputError: an empty prompt, an id outside the vocabulary, or a row that would outgrow the context.
        """
        limit = self.config.max_position_embeddings
        for row in rows:
            if not row.ids:
                raise InputError("the prompt is empty; give at least one token")
            if row.max_new_tokens < 1:
                raise InputError(f"max_new_tokens must be at least 1, got {row.max_new_tokens}")
            outside = [i for i in row.ids if not 0 <= i < self.config.vocab_size]
            if outside:
                raise InputError(f"token {outside[0]} outside vocabulary 0–{self.config.vocab_size - 1}")
            if len(row.ids) + row.max_new_tokens > limit:
                raise InputError(
                    f"prompt is {len(row.ids):,} tokens; limit {limit:,} including {row.max_new_tokens:,} to generate"
                )

    def stream(
        self, rows: Sequence[Row], settings: GenerationSettings, chunk: int = CHUNK
    ) -> Iterator[list[list[int]]]:
        """Generate; yields, chunk by chunk, each row's new ids (a stop id included).

        The consumer may stop early by closing the iterator.

        Raises:
            InputError: see `check`; or the model's logits are NaN or infinite.
        """
        self.check(rows)
        batch = kv.bucket(len(rows), 1)
        longest = max(len(row.ids) for row in rows)
        needed = longest + min(max(row.max_new_tokens for row in rows), 256)
        cache = kv.empty(self.config, batch, kv.bucket(needed), self.dtype)
        conversation = Conversation(self, cache, settings, [row.seed for row in rows])
        conversation.append([row.ids for row in rows])
        yield from conversation.generate([row.max_new_tokens for row in rows], chunk)


class Conversation:
    """A batch whose cache lives on between calls: append tokens, generate, append more.

    Nothing is computed twice: only appended tokens are prefilled.
    """

    def __init__(self, generator: Generator, cache: KVCache, settings: GenerationSettings, seeds: Sequence[int]):
        self.generator = generator
        self.cache = cache
        self.rows = len(seeds)
        self.lengths = np.zeros(self.rows, np.int64)
        self.knobs = _knobs(settings, seeds, self._batch)
        self.logits: Array | None = None

    @property
    def _batch(self) -> int:
        return self.cache.lengths.shape[0]

    def append(self, ids: Sequence[Sequence[int]]) -> None:
        """Prefill new tokens of each row.

        Raises:
            InputError: a row without new tokens, or one that would outgrow the context.
        """
        counts = np.array([len(row) for row in ids])
        if not counts.all():
            # Its logits would be those of padding.
            raise InputError(f"row {int(counts.argmin())} appends nothing; give each row at least one token")
        self._check_room(counts)
        width = kv.bucket(int(counts.max()), MINIMUM_PREFILL)
        padded = np.zeros((self._batch, width), np.int32)
        for row, values in enumerate(ids):
            padded[row, : len(values)] = values
        self._reserve(int((self.lengths + counts).max()))
        generator = self.generator
        self.logits, self.cache = prefill(
            generator.config, generator.params, self.cache, jnp.asarray(padded), jnp.asarray(self._padded(counts))
        )
        self.lengths += counts

    def generate(self, budgets: Sequence[int], chunk: int = CHUNK) -> Iterator[list[list[int]]]:
        """Continue every row until a stop id or its budget; yields each chunk's new ids by row.

        Raises:
            InputError: a budget that the context does not hold, before anything runs; or the
                model's logits are NaN or infinite.
        """
        assert self.logits is not None, "append tokens first"
        self._check_room(np.array(budgets))
        budget = self._padded(np.array(budgets))
        none = jnp.zeros(self._batch, bool)
        state = State(self.cache, self.logits, jnp.asarray(budget <= 0), jnp.asarray(budget), none)
        remaining = int(budget.max())
        while remaining > 0 and not bool(np.asarray(state.done).all()):
            steps = min(chunk, CHUNK, remaining)
            self._reserve(int(self.lengths.max()) + steps)
            state = state._replace(cache=kv.grown(state.cache, self.cache.slots))
            state, ids = decode(
                self.generator.config,
                self.generator.params,
                state,
                self.knobs,
                self.generator.vocabulary,
                jnp.int32(steps),
            )
            self.cache, self.logits = state.cache, state.logits
            new = [[int(i) for i in row if i >= 0] for row in np.asarray(ids)[: self.rows]]
            self.lengths += [len(row) for row in new]
            if bool(np.asarray(state.broken).any()):
                raise InputError("the model's logits are NaN or infinite; run `jaxgpt inspect` on the checkpoint")
            remaining -= steps
            yield new

    def forget(self, lengths: Sequence[int]) -> None:
        """Keep only the first `lengths[b]` tokens of each row; append before generating again."""
        assert (np.array(lengths) <= self.lengths).all(), "a row cannot keep more than it holds"
        self.lengths = np.array(lengths, np.int64)
        self.cache = self.cache._replace(lengths=jnp.asarray(self._padded(self.lengths)))
        self.logits = None

    def _padded(self, values: np.ndarray) -> np.ndarray:
        return np.pad(values.astype(np.int32), (0, self._batch - self.rows))

    def _check_room(self, new: np.ndarray) -> None:
        """The cache would grow, but positions beyond the context mean nothing."""
        limit, row = self.generator.config.max_position_embeddings, int((self.lengths + new).argmax())
        if self.lengths[row] + new[row] > limit:
            raise InputError(f"{self.lengths[row]:,} tokens and {new[row]:,} more; limit {limit:,}")

    def _reserve(self, tokens: int) -> None:
        self.cache = kv.grown(self.cache, kv.bucket(tokens))


def _knobs(settings: GenerationSettings, seeds: Sequence[int], batch: int) -> sampling.Knobs:
    padded = np.pad(np.array(seeds, np.uint32), (0, batch - len(seeds)))
    return sampling.Knobs(
        temperature=jnp.full(batch, settings.temperature or 0.0, jnp.float32),
        top_k=jnp.full(batch, min(settings.top_k, np.iinfo(np.int32).max), jnp.int32),
        top_p=jnp.full(batch, settings.top_p, jnp.float32),
        seed=jnp.asarray(padded),
    )
