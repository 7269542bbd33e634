"""From logits to ids: pure, per row, every knob a run-time value.

Nothing here depends on a knob's value at compile time, so changing one never
recompiles; what is off costs nothing, because `cond` skips it. Nothing sorts the
vocabulary:

- the k-th largest logit is found among the largest of each of many short columns;
- an id is drawn by inverting the cumulative mass, first over columns, then in one;
- top-p is a question about the drawn id alone, whether those above it hold less
  mass than p. Rejected ids are drawn again from the logits above them, which is exact
  and needs few draws: 1/p at most, and the logarithm of that for a small p
  (FlashInfer, Ye et al. 2025, "sorting-free sampling").

The order is transformers': repetition penalty, n-grams, temperature, top-k, top-p, min-p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

SMALLEST = 1e-30
"""Temperature below which nothing changes: any two different logits are infinitely far apart."""
COLUMN = 32
"""Logits of a column."""
SEARCHED = 128
"""Columns in which the k-th largest logit is looked for, if k is no larger than this."""


class Knobs(NamedTuple):
    """Sampling settings of each row of a batch."""

    temperature: Float[Array, "B"]
    """At or below 0 the row is strictly greedy: no other knob applies."""
    top_k: Int[Array, "B"]
    """Keep the k most likely ids; 0 keeps all."""
    top_p: Float[Array, "B"]
    """Keep the most likely ids that together reach this probability; 1 keeps all."""
    min_p: Float[Array, "B"]
    """Keep ids at least this share as likely as the most likely one; 0 keeps all."""
    repetition_penalty: Float[Array, "B"]
    """Positive logits of ids seen before are divided by it, negative ones multiplied; 1 changes none."""
    no_repeat_ngram_size: Int[Array, "B"]
    """No sequence of this many ids comes twice; 0 allows all."""
    seed: UInt[Array, "B"]
    """With the position, decides the draw: neighbours in the batch do not."""
    logprobs: Bool[Array, "B"]
    """Whether the log-probability of the drawn id is wanted."""


class History(NamedTuple):
    """What each row has read and said."""

    ids: Int[Array, "B S"]
    """The id of each position; beyond the row's length they mean nothing."""
    lengths: Int[Array, "B"]

    @property
    def written(self) -> Bool[Array, "B S"]:
        """Where a row has an id."""
        return jnp.arange(self.ids.shape[1]) < self.lengths[:, None]


def sample(
    logits: Float[Array, "B V"], sampleable: Bool[Array, "V"], knobs: Knobs, history: History
) -> Int[Array, "B"]:
    """The next id of each row, only ever one that is `sampleable`.

    The position it will have, which is the length of the row's history, and the row's
    seed name the random draw.
    """
    logits = jnp.where(sampleable, logits, -jnp.inf)
    greedy = _first_largest(logits)
    is_greedy = knobs.temperature <= 0

    def draw() -> Array:
        return jnp.where(is_greedy, greedy, _drawn(penalised(logits, knobs, history), knobs, history.lengths))

    return jax.lax.cond(is_greedy.all(), lambda: greedy, draw)


def logprobs(logits: Float[Array, "B V"], ids: Int[Array, "B"], knobs: Knobs) -> Float[Array, "B"]:
    """Log-probability the model itself gives each id, over its whole vocabulary; 0 where no row asks."""

    def normalised() -> Array:
        whole = logits.astype(jnp.float32)
        return _at(whole, ids) - jax.nn.logsumexp(whole, axis=-1)

    return jax.lax.cond(knobs.logprobs.any(), normalised, lambda: jnp.zeros(ids.shape, jnp.float32))


def _first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax`, ties to the first, as two reductions: several times faster on a CPU."""
    size = logits.shape[-1]
    ids = jnp.arange(size, dtype=jnp.int32)
    first = jnp.where(logits == logits.max(axis=-1, keepdims=True), ids, size).min(axis=-1)
    # Nothing equals NaN; the caller tells such a row by its largest logit.
    return jnp.minimum(first, size - 1)


def _at(values: Array, ids: Int[Array, "B"]) -> Array:
    return jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]


# -- What was said before ----------------------------------------------------------------


def penalised(logits: Float[Array, "B V"], knobs: Knobs, history: History) -> Float[Array, "B V"]:
    """Logits after the repetition penalty and the ban of repeated n-grams, over prompt and reply alike.

    As transformers' RepetitionPenaltyLogitsProcessor and NoRepeatNGramLogitsProcessor, but
    for a row in which every id would be banned: there is no other to draw, so none is.
    """
    penalty, size = knobs.repetition_penalty, knobs.no_repeat_ngram_size
    logits = jax.lax.cond((penalty != 1).any(), lambda: _less_likely(logits, penalty, history), lambda: logits)
    return jax.lax.cond((size > 0).any(), lambda: _banned(logits, size, history), lambda: logits)


def _less_likely(logits: Float[Array, "B V"], penalty: Float[Array, "B"], history: History) -> Float[Array, "B V"]:
    had = jnp.take_along_axis(logits, history.ids, axis=-1)
    changed = jnp.where(had > 0, had / penalty[:, None], had * penalty[:, None])
    return _scattered(logits, history.ids, history.written, changed)


def _banned(logits: Float[Array, "B V"], size: Int[Array, "B"], history: History) -> Float[Array, "B V"]:
    ends = _ends_of_repeats(size, history)
    left = _scattered(logits, history.ids, ends, jnp.full(ends.shape, -jnp.inf, logits.dtype))
    has_some = left.max(axis=-1, keepdims=True) > -jnp.inf
    return jnp.where(has_some, left, logits)


def _scattered(
    logits: Float[Array, "B V"], ids: Int[Array, "B S"], where: Bool[Array, "B S"], values: Float[Array, "B S"]
) -> Float[Array, "B V"]:
    outside = jnp.where(where, ids, logits.shape[-1])  # a scatter drops it
    return logits.at[jnp.arange(len(logits))[:, None], outside].set(values, mode="drop")


def _ends_of_repeats(size: Int[Array, "B"], history: History) -> Bool[Array, "B S"]:
    """Where an n-gram ends that begins like the row's last n - 1 ids: its last id must not come now."""
    ids, lengths = history
    slots = jnp.arange(ids.shape[1])
    candidates = history.written & (size[:, None] > 0) & (slots >= size[:, None] - 1)

    def unfinished(carry: tuple[Array, Array]) -> Array:
        back, same = carry
        # Row by row: one that is done with short n-grams must not keep another's million going.
        return ((back < size) & same.any(axis=1)).any()

    def compare(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        back, same = carry
        last = _at(ids, jnp.maximum(lengths - back, 0))
        # What rolls in at the front lies before a whole n-gram, so is no candidate.
        alike = jnp.roll(ids, back, axis=1) == last[:, None]
        return back + 1, same & (alike | (back >= size[:, None]))

    return jax.lax.while_loop(unfinished, compare, (jnp.int32(1), candidates))[1]


# -- The draw ----------------------------------------------------------------------------


def _drawn(logits: Float[Array, "B V"], knobs: Knobs, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """Draw from the ids that temperature, top-k, top-p and min-p leave."""
    logits = _whole_columns(logits)
    keys = _ordered_bits(logits)
    kept = keys >= top_k_threshold(logits, keys, knobs.top_k)[:, None]
    mass = jnp.where(kept, relative_mass(logits, knobs.temperature), 0.0)
    reach = jnp.where(knobs.top_p < 1, knobs.top_p * _sum(mass), jnp.inf)
    drawable = jnp.where(mass >= knobs.min_p[:, None], mass, 0.0)

    def attempt(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        number, ids, done, below = carry
        uniform = _uniform(knobs.seed, positions, number)
        new = _inverted(jnp.where(keys > below[:, None], drawable, 0.0), uniform)
        passed = within_top_p(keys, mass, reach, new)
        return number + 1, jnp.where(done, ids, new), done | passed, jnp.where(done, below, _at(keys, new))

    rows = positions.shape
    start = (jnp.uint32(0), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.uint32))
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), attempt, start)[1]


def relative_mass(logits: Float[Array, "B V"], temperature: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Probability at this temperature, as a share of the most likely id's."""
    # A greedy row is computed like any other and then not used; its divisor must not be 0.
    divisor = jnp.where(temperature > 0, jnp.maximum(temperature, SMALLEST), 1.0)
    return jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / divisor[:, None])


def within_top_p(
    keys: UInt[Array, "B V"], mass: Float[Array, "B V"], reach: Float[Array, "B"], ids: Int[Array, "B"]
) -> Bool[Array, "B"]:
    """Whether the ids above each row's id, ties excepted, have less mass than `reach`."""

    def above() -> Array:
        return _sum(jnp.where(keys > _at(keys, ids)[:, None], mass, 0.0))

    sums = jax.lax.cond(jnp.isinf(reach).all(), lambda: jnp.zeros_like(reach), above)
    # Nothing is above the most likely id, however small p is. A NaN would ask for ever.
    return ~(sums >= reach) | (sums == 0)


def _uniform(seed: UInt[Array, "B"], positions: Int[Array, "B"], attempt: UInt[Array, ""]) -> Float[Array, "B"]:
    def row(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), attempt)
        return jax.random.uniform(key, (), jnp.float32)

    return jax.vmap(row)(seed, positions)


def _inverted(mass: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The id at this share of the whole mass, counted column by column; never one without mass."""
    columns = _columns(mass)
    sums = columns.sum(axis=1)
    column, rest = _crossed(sums, uniform * _sum(mass))
    place, _ = _crossed(jnp.take_along_axis(columns, column[:, None, None], axis=2)[..., 0], rest)
    return place * columns.shape[2] + column


def _crossed(mass: Float[Array, "B N"], target: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Where the cumulative mass passes the target, and how much of the target falls there."""
    upto = jnp.cumsum(mass, axis=-1)
    passing = (upto > target[:, None]) & (mass > 0)
    # Sums rounded otherwise may stay below the target to the end.
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    found = jnp.where(passing.any(axis=-1), jnp.argmax(passing, axis=-1), last).astype(jnp.int32)
    return found, target - (_at(upto, found) - _at(mass, found))


def _whole_columns(logits: Float[Array, "B V"]) -> Float[Array, "B W"]:
    return jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % COLUMN)), constant_values=-jnp.inf)


def _columns(values: Array) -> Array:
    """(B, V) as (B, COLUMN, V / COLUMN): a CPU adds whole vectors along the middle axis."""
    return values.reshape(len(values), COLUMN, -1)


def _sum(values: Float[Array, "B V"]) -> Float[Array, "B"]:
    return _columns(values).sum(axis=1).sum(axis=-1)


# -- The k-th largest ----------------------------------------------------------------------


def top_k_threshold(logits: Float[Array, "B V"], keys: UInt[Array, "B V"], top_k: Int[Array, "B"]) -> UInt[Array, "B"]:
    """The k-th largest key of each row, so that ties at it are kept together; 0 where k asks for all."""
    searched = (top_k > 0) & (top_k < keys.shape[-1])
    k = jnp.where(searched, top_k, 1)

    def among_columns() -> Array:
        # Keys above the k-th lie in less than k columns, and those have the k - 1 largest maxima.
        # XLA has a partial selection for floats; integers it would sort.
        _, best = jax.lax.top_k(_columns(logits).max(axis=1), SEARCHED)
        return _kth_largest(jnp.take_along_axis(_columns(keys), best[:, None], axis=2).reshape(len(keys), -1), k)

    def search() -> Array:
        if keys.shape[-1] <= COLUMN * SEARCHED:
            return _kth_largest(keys, k)
        return jax.lax.cond((k <= SEARCHED).all(), among_columns, lambda: _kth_largest(keys, k))

    found = jax.lax.cond(searched.any(), search, lambda: jnp.zeros(k.shape, jnp.uint32))
    return jnp.where(searched, found, jnp.uint32(0))


def _kth_largest(keys: UInt[Array, "B N"], k: Int[Array, "B"]) -> UInt[Array, "B"]:
    """By 32 halvings, bit by bit, whatever N."""

    def halve(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(keys >= candidate[:, None], axis=-1, dtype=jnp.int32) >= k
        return jnp.where(reached, candidate, threshold)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros(k.shape, jnp.uint32))


def _ordered_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the floats (negative floats' bits run backwards)."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0.0 is 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
