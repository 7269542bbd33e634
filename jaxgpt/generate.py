"""Generation: prefill and a decode loop on the device, streamed back in chunks.

Three jitted functions. `prefill` and `decode` take the whole state and give it back
(donated, so the cache is updated in place); `draw` takes an id from logits, alone for the
first of a reply that is watched, and inside `decode`. Everything that varies between calls
is a run-time value or a power-of-two bucket, so after warm-up (`Buckets`) nothing compiles.
What comes from the host is put on the device as it is; `jnp.asarray` would be one more program for each shape.
Every sampled token is also stored, so the cache holds exactly the prompt and what was
generated; forgetting the tail is setting a smaller length. Only who leaves after the first id
of a reply leaves it unread: the loop that stores it comes after it.
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
from jaxgpt.buckets import MINIMUM_PREFILL, Buckets
from jaxgpt.cache import KVCache
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.settings import GenerationSettings

CHUNK = 32
"""Most decode steps between two reads by the host."""
WIDE = 8
"""Rows from which the products of a chunk save more than turning the kernels costs."""


class State(NamedTuple):
    """A batch in the middle of generation."""

    cache: KVCache
    said: Int[Array, "B S"]
    """The id of each slot of the cache; beyond a row's length they mean nothing."""
    logits: Float[Array, "B V"]
    """Of the last stored token: what the next id is drawn from."""
    done: Bool[Array, "B"]
    budget: Int[Array, "B"]
    """Tokens each row may still generate."""
    broken: Bool[Array, "B"]
    """The row's logits were NaN or infinite."""
    drawn: Int[Array, "B"]
    """The next id where it was drawn from `logits` already, or -1."""


class Draw(NamedTuple):
    """The next id of each row."""

    ids: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    broken: Bool[Array, "B"]
    """The logits are NaN or infinite, which would otherwise be sampled as if nothing had happened."""


class Vocabulary(NamedTuple):
    """What the decode loop must know of the tokenizer."""

    sampleable: Bool[Array, "V"]
    """False for padded rows of the embedding, which must never be generated."""
    stops: Bool[Array, "V"]
    """True for ids that end a row."""


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def prefill(
    config: ModelConfig,
    params: model.Params,
    cache: KVCache,
    said: Int[Array, "B S"],
    ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], KVCache, Int[Array, "B S"]]:
    """Store the first `counts[b]` of `ids[b]`; logits of each row's last token."""
    said = kv.written(said, cache.lengths, ids, counts)
    output, cache = model.forward_cached(config, params, ids, counts, cache, last_only=True)
    return output.logits[:, 0], cache, said


@jax.jit
def draw(logits: Float[Array, "B V"], history: sampling.History, knobs: sampling.Knobs, vocabulary: Vocabulary) -> Draw:
    """The ids that follow; traced once, for its own program and for the decode loop."""
    ids = sampling.sample(logits, vocabulary.sampleable, knobs, history)
    return Draw(ids, sampling.logprobs(logits, ids, knobs), ~jnp.isfinite(logits.max(axis=-1)))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: ModelConfig,
    params: model.Params,
    state: State,
    knobs: sampling.Knobs,
    vocabulary: Vocabulary,
    steps: Int[Array, ""],
) -> tuple[State, Int[Array, "B C"], Float[Array, "B C"]]:
    """Up to `steps` (at most CHUNK) sample-and-store steps; ids, -1 where a row was done; their log-probabilities."""
    if state.done.shape[0] >= WIDE and _is_faster_turned(params):
        params = model.turned(params)

    def unfinished(carry: tuple[Array, State, Array, Array]) -> Array:
        step, state, _, _ = carry
        return (step < steps) & ~state.done.all()

    def advance(carry: tuple[Array, State, Array, Array]) -> tuple[Array, State, Array, Array]:
        step, state, ids, logprobs = carry
        state, new, probability = _step(config, params, state, knobs, vocabulary)
        return step + 1, state, ids.at[:, step].set(new), logprobs.at[:, step].set(probability)

    shape = (state.done.shape[0], CHUNK)
    start = (jnp.int32(0), state, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, ids, logprobs = jax.lax.while_loop(unfinished, advance, start)
    return state, ids, logprobs


def _is_faster_turned(params: model.Params) -> bool:
    """On a CPU, in float32; 16-bit kernels are widened for every product anyway, and a GPU takes either."""
    kernels = [array for name, array in params.items() if name.endswith(".kernel")]
    return jax.default_backend() == "cpu" and all(array.dtype == jnp.float32 for array in kernels)


def _step(
    config: ModelConfig, params: model.Params, state: State, knobs: sampling.Knobs, vocabulary: Vocabulary
) -> tuple[State, Int[Array, "B"], Float[Array, "B"]]:
    live = ~state.done
    new = draw(state.logits, sampling.History(state.said, state.cache.lengths), knobs, vocabulary)
    # What was shown is what is stored, though both programs should draw the same.
    ids = jnp.where(state.drawn >= 0, state.drawn, new.ids)
    counts = live.astype(jnp.int32)
    said = kv.written(state.said, state.cache.lengths, ids[:, None], counts)
    output, cache = model.forward_cached(config, params, ids[:, None], counts, state.cache)
    budget = state.budget - counts
    broken = state.broken | (live & new.broken)
    done = state.done | vocabulary.stops[ids] | (budget <= 0) | broken
    state = State(cache, said, output.logits[:, 0], done, budget, broken, jnp.full_like(ids, -1))
    return state, jnp.where(live, ids, -1), new.logprobs


class Chunk(NamedTuple):
    """What a batch said between two reads by the host, by row."""

    ids: list[list[int]]
    logprobs: list[list[float]] | None
    """Of each id, by the model alone; None unless the settings ask for them."""

    def without_first(self) -> "Chunk":
        """What comes after the first id of each row."""
        logprobs = None if self.logprobs is None else [row[1:] for row in self.logprobs]
        return Chunk([row[1:] for row in self.ids], logprobs)


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
        stops = np.isin(ids, list(stop_ids))
        self.vocabulary = Vocabulary(jax.device_put(ids < real_ids), jax.device_put(stops))
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
        for new in self.chunks(rows, settings, chunk):
            yield new.ids

    def chunks(self, rows: Sequence[Row], settings: GenerationSettings, chunk: int = CHUNK) -> Iterator[Chunk]:
        """As `stream`, with log-probabilities where the settings ask for them."""
        self.check(rows)
        batch = kv.bucket(len(rows), 1)
        longest = max(len(row.ids) for row in rows)
        needed = longest + min(max(row.max_new_tokens for row in rows), 256)
        cache = kv.empty(self.config, batch, kv.bucket(needed), self.dtype)
        conversation = Conversation(self, cache, settings, [row.seed for row in rows])
        conversation.append([row.ids for row in rows])
        yield from conversation.chunks([row.max_new_tokens for row in rows], chunk)

    def warm_up(self, buckets: Buckets) -> None:
        """Compile what any generation within the buckets runs, by running it on the real path.

        Raises:
            InputError: caches of more tokens than the context holds.
        """
        limit = self.config.max_position_embeddings
        if kv.bucket(limit) < buckets.slots[-1]:
            raise InputError(f"cannot warm up for {buckets.slots[-1]:,} tokens; the context holds {limit:,}")
        for batch in buckets.batches:
            for slots in buckets.slots:
                self._warm_up(batch, slots, buckets)

    def _warm_up(self, batch: int, slots: int, buckets: Buckets) -> None:
        cache = kv.empty(self.config, batch, slots, self.dtype)
        conversation = Conversation(self, cache, GenerationSettings(), [0] * batch)
        for width in buckets.widths_in(slots):
            conversation.forget([0] * batch)
            # The shortest prompt of its bucket; the context holds it if it holds any of them.
            conversation.append([[0] * (width // 2 + 1)] * batch)
        conversation.forget([0] * batch)
        conversation.append([[0]] * batch)
        for _ in conversation.generate([1] * batch, chunk=1):
            pass
        if 2 * slots in buckets.slots:
            conversation.reserve(slots + 1)


class Conversation:
    """A batch whose cache lives on between calls: append tokens, generate, append more.

    Nothing is computed twice: only appended tokens are prefilled.
    """

    def __init__(self, generator: Generator, cache: KVCache, settings: GenerationSettings, seeds: Sequence[int]):
        self.generator = generator
        self.cache = cache
        self.said = kv.nothing_said(cache)
        self.rows = len(seeds)
        self.lengths = np.zeros(self.rows, np.int64)
        self.logits: Array | None = None
        self.configure(settings, seeds)

    @property
    def _batch(self) -> int:
        return self.cache.lengths.shape[0]

    def configure(self, settings: GenerationSettings, seeds: Sequence[int]) -> None:
        """Other settings from the next id on; what was read stays read."""
        self.knobs = _knobs(settings, seeds, self._batch)
        self.with_logprobs = settings.logprobs

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
        self.reserve(int((self.lengths + counts).max()))
        self.logits, self.cache, self.said = prefill(
            self.generator.config,
            self.generator.params,
            self.cache,
            self.said,
            jax.device_put(padded),
            jax.device_put(self._padded(counts)),
        )
        self.lengths += counts

    def generate(self, budgets: Sequence[int], chunk: int = CHUNK) -> Iterator[list[list[int]]]:
        """Continue every row until a stop id or its budget; yields each chunk's new ids by row.

        Raises:
            InputError: a budget that the context does not hold, before anything runs; or the
                model's logits are NaN or infinite.
        """
        for new in self.chunks(budgets, chunk):
            yield new.ids

    def chunks(self, budgets: Sequence[int], chunk: int = CHUNK) -> Iterator[Chunk]:
        """As `generate`, with log-probabilities where the settings ask for them."""
        assert self.logits is not None, "append tokens first"
        self._check_room(np.array(budgets))
        budget = self._padded(np.array(budgets))
        # Asked of the host: the device is still busy with the prompt, and what comes next can be traced meanwhile.
        done = budget <= 0
        rows = (done, budget, np.zeros_like(done), np.full(self._batch, -1, np.int32))
        state = State(self.cache, self.said, self.logits, *jax.device_put(rows))
        shown = 0
        if chunk < CHUNK and not done.all():
            # Who watches a reply sees its first id before the decode loop is even loaded.
            history = sampling.History(self.said, self.cache.lengths)
            first = draw(self.logits, history, self.knobs, self.generator.vocabulary)
            ids, logprobs, broken = map(np.asarray, first)
            _refuse_broken(broken & ~done)
            yield self._read(np.where(done, -1, ids)[:, None], logprobs[:, None])
            state, shown = state._replace(drawn=first.ids), 1
        remaining = int(budget.max())
        while remaining > 0 and not done.all():
            steps = min(chunk + shown, CHUNK, remaining)
            self.reserve(int(self.lengths.max()) + steps)
            state, ids, logprobs = decode(
                self.generator.config,
                self.generator.params,
                state._replace(cache=self.cache, said=self.said),
                self.knobs,
                self.generator.vocabulary,
                jax.device_put(np.int32(steps)),
            )
            self.cache, self.said, self.logits = state.cache, state.said, state.logits
            stored = self._read(ids, logprobs)
            self.lengths += [len(row) for row in stored.ids]
            _refuse_broken(state.broken)
            remaining -= steps
            done = np.asarray(state.done)
            new = stored.without_first() if shown else stored
            shown = 0
            if any(new.ids):
                yield new

    def _read(self, ids: Array | np.ndarray, logprobs: Array | np.ndarray) -> Chunk:
        """To the host: each row's ids up to where it was done."""
        new = [[int(i) for i in row if i >= 0] for row in np.asarray(ids)[: self.rows]]
        if not self.with_logprobs:
            return Chunk(new, None)
        values = np.asarray(logprobs)
        return Chunk(new, [values[row, : len(said)].tolist() for row, said in enumerate(new)])

    def forget(self, lengths: Sequence[int]) -> None:
        """Keep only the first `lengths[b]` tokens of each row; append before generating again."""
        assert (np.array(lengths) <= self.lengths).all(), "a row cannot keep more than it holds"
        self.lengths = np.array(lengths, np.int64)
        self.cache = self.cache._replace(lengths=jax.device_put(self._padded(self.lengths)))
        self.logits = None

    def _padded(self, values: np.ndarray) -> np.ndarray:
        return np.pad(values.astype(np.int32), (0, self._batch - self.rows))

    def _check_room(self, new: np.ndarray) -> None:
        """The cache would grow, but positions beyond the context mean nothing."""
        limit, row = self.generator.config.max_position_embeddings, int((self.lengths + new).argmax())
        if self.lengths[row] + new[row] > limit:
            raise InputError(f"{self.lengths[row]:,} tokens and {new[row]:,} more; limit {limit:,}")

    def reserve(self, tokens: int) -> None:
        """Let the cache hold this many tokens a row."""
        while self.cache.slots < tokens:
            # By doubling, so that each size is reached from one other only.
            self.cache = kv.grown(self.cache, 2 * self.cache.slots)
            self.said = jnp.pad(self.said, ((0, 0), (0, self.cache.slots - self.said.shape[1])))


def _refuse_broken(rows: Array | np.ndarray) -> None:
    if np.asarray(rows).any():
        raise InputError("the model's logits are NaN or infinite; run `jaxgpt inspect` on the checkpoint")


def _knobs(settings: GenerationSettings, seeds: Sequence[int], batch: int) -> sampling.Knobs:
    most = np.iinfo(np.int32).max

    def filled(value: float, dtype: Any) -> Array:
        return jax.device_put(np.full(batch, value, dtype))

    return sampling.Knobs(
        temperature=filled(settings.temperature or 0.0, np.float32),
        top_k=filled(min(settings.top_k, most), np.int32),
        top_p=filled(settings.top_p, np.float32),
        min_p=filled(settings.min_p, np.float32),
        repetition_penalty=filled(settings.repetition_penalty, np.float32),
        no_repeat_ngram_size=filled(min(settings.no_repeat_ngram_size, most), np.int32),
        seed=jax.device_put(np.pad(np.array(seeds, np.uint32), (0, batch - len(seeds)))),
        logprobs=filled(settings.logprobs, np.bool_),
    )
