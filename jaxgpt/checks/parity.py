"""One model, several ways to its logits: training, evaluation, cached prefill, cached decode.

The ways must agree within `ALLOWED` times the measured noise. Beyond it is FAIL,
naming the path; a different most likely id within it is TIE, because either id is
right as far as the dtype can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import cache as kv
from jaxgpt import generate, model
from jaxgpt.checks.noise import ALLOWED, cached, distance, measured, uncached
from jaxgpt.checks.report import CheckLine, token
from jaxgpt.flops import flops_per_token
from jaxgpt.lm import LM
from jaxgpt.settings import GenerationSettings

STEPS = 16
"""Greedy steps, unless the context is shorter."""
LENGTHS = (1, 5, 9, 14)
"""Prompt lengths of the ragged batch."""
AFFORDABLE_SCORES = 2**30
"""Largest attention matrix, in bytes, of a whole context that is computed at once."""
AFFORDABLE_FLOPS = 1e12
"""Most work of one forward over the whole context on a CPU: some ten seconds."""


@dataclass(frozen=True)
class Measured:
    """Logits (B, S, V) of one path beside the evaluation forward's, over S steps."""

    path: str
    logits: np.ndarray
    reference: np.ndarray
    noise: float
    first_step: int = 0
    """Number of the first of the S steps."""

    @property
    def ratio(self) -> float:
        """Largest distance in multiples of the noise; infinite where a logit is not a number."""
        largest = float(distance(self.logits, self.reference).max())
        if not np.isfinite(largest):
            return float("inf")
        return largest / self.noise if self.noise else (0.0 if largest == 0 else float("inf"))

    def first_apart(self) -> tuple[int, int] | None:
        """(step, row) of the first place that differs by more than noise."""
        apart = ~(distance(self.logits, self.reference) <= ALLOWED * self.noise)
        return _first(apart)

    def first_tie(self, real_ids: int) -> tuple[int, int] | None:
        """(step, row) of the first place whose most likely ids differ."""
        mine, other = (logits[..., :real_ids].argmax(axis=-1) for logits in (self.logits, self.reference))
        return _first(mine != other)

    def describe(self, at: tuple[int, int], lm: LM) -> str:
        """Step, both ids and strings, and how far the logits are apart there."""
        step, row = at
        mine, other = self.logits[row, step], self.reference[row, step]
        ids = [token(lm.tokenizer, int(logits[: lm.real_ids].argmax())) for logits in (mine, other)]
        delta = np.abs(mine.astype(np.float64) - other.astype(np.float64))
        return (
            f"{self.path} at step {self.first_step + step}, row {row}: {ids[0]}, evaluation {ids[1]}; "
            f"|Δ| max {delta.max():.2g}, mean {delta.mean():.2g}; {self.ratio:.2g} × the measured noise of "
            f"{self.noise:.2g} (allowed {ALLOWED:g})"
        )


def _first(found: np.ndarray) -> tuple[int, int] | None:
    """(step, row) of the first True of (B, S), earliest step first."""
    places = np.argwhere(found.T)
    return (int(places[0][0]), int(places[0][1])) if len(places) else None


def _verdict(name: str, lm: LM, paths: Sequence[Measured], wrong: Sequence[str], note: str = "") -> CheckLine:
    """FAIL at the first path beyond noise (`wrong` says what that means), else TIE or PASS."""
    for path, cause in zip(paths, wrong, strict=True):
        at = path.first_apart()
        if at is not None:
            return CheckLine(name, "FAIL", f"{path.describe(at, lm)}; {cause}{_cache_dtype_hint(lm)}")
    for path in paths:
        at = path.first_tie(lm.real_ids)
        if at is not None:
            return CheckLine(name, "TIE", path.describe(at, lm) + note)
    ratios = ", ".join(f"{path.path} {path.ratio:.2g}" for path in paths)
    return CheckLine(name, "PASS", f"differences in multiples of the measured noise: {ratios}{note}")


def _cache_dtype_hint(lm: LM) -> str:
    same = jnp.dtype(lm.generator.dtype) == jnp.dtype(lm.compute_dtype)
    return "" if same else f" (the cache is {jnp.dtype(lm.generator.dtype)}, compute is {lm.compute_dtype})"


def too_short(lm: LM) -> bool:
    """The context holds no prompt with a step after it."""
    return lm.config.max_position_embeddings < 4


def short_prompts(lm: LM) -> tuple[list[list[int]], int]:
    """A ragged batch of fixed random prompts, and how many steps fit after the longest."""
    limit = lm.config.max_position_embeddings
    steps = min(STEPS, limit // 2)
    rng = np.random.default_rng(0)
    lengths = [min(length, limit - steps) for length in LENGTHS]
    return [rng.integers(0, lm.real_ids, length).tolist() for length in lengths], steps


# -- Forward parity --------------------------------------------------------------------


def forward_parity_test(lm: LM) -> CheckLine:
    """Training forward with dropout off = evaluation = cached prefill = cached decode, token by token."""
    name = "forward_parity_test"
    if too_short(lm):
        return CheckLine(name, "SKIP", "the context is shorter than 4 tokens")
    prompts, steps = short_prompts(lm)
    B, T = len(prompts), max(map(len, prompts)) + steps
    ids = jnp.asarray(np.random.default_rng(1).integers(0, lm.real_ids, (B, T)), jnp.int32)
    evaluation = lm.logits(ids)
    noise = measured(evaluation, lm.config, lm.params, ids, tail=T)
    empty = kv.empty(lm.config, B, kv.bucket(T), lm.generator.dtype)
    prefilled, _ = cached(lm.config, lm.params, empty, ids, jnp.full(B, T))
    paths = [
        Measured("training", _training_logits(lm, ids), evaluation, noise),
        Measured("cached prefill", np.asarray(prefilled), evaluation, noise),
        Measured("cached decode", _decoded_logits(lm, ids, T - steps), evaluation[:, T - steps :], noise, T - steps),
    ]
    wrong = ["the training forward is wrong", "prefill is wrong", "the cache update is wrong"]
    return _verdict(name, lm, paths, wrong)


def _training_logits(lm: LM, ids: jax.Array) -> np.ndarray:
    """As `train_step` runs it on a packed row, but for the dropped numbers."""
    B, T = ids.shape
    keep = {f"{place}_dropout": _keep for place in ("embedding", "attention", "residual")}
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def forward(params: model.Params) -> jax.Array:
        return model.forward(
            lm.config,
            params,
            ids,
            positions=positions,
            segments=jnp.ones_like(ids),
            rng=jax.random.key(0),
            replace=keep,
        ).logits

    return np.asarray(jax.jit(forward)(lm.params), np.float32)


def _keep(config: object, p: object, x: jax.Array, rng: object) -> jax.Array:
    return x


def _decoded_logits(lm: LM, ids: jax.Array, start: int) -> np.ndarray:
    """Logits from place `start` on, one token at a time after a prefill of those before."""
    B, T = ids.shape
    cache = kv.empty(lm.config, B, kv.bucket(T), lm.generator.dtype)
    # Padded to T, so that it is the program that prefilled everything.
    _, cache = cached(lm.config, lm.params, cache, ids, jnp.full(B, start))
    steps: list[np.ndarray] = []
    for t in range(start, T):
        logits, cache = cached(lm.config, lm.params, cache, ids[:, t : t + 1], jnp.ones(B, jnp.int32))
        steps.append(np.asarray(logits))
    return np.concatenate(steps, axis=1)


# -- Greedy generation against whole forwards --------------------------------------------


def kv_cache_parity_steps_test(lm: LM) -> CheckLine:
    """Greedy steps of the real generator against whole forwards: a ragged batch, and up to the context's edge."""
    name = "kv_cache_parity_steps_test"
    if too_short(lm):
        return CheckLine(name, "SKIP", "the context is shorter than 4 tokens")
    prompts, steps = short_prompts(lm)
    conversation = endless(lm, len(prompts), max(map(len, prompts)) + steps)
    conversation.append(prompts)
    paths = [_ragged(lm, prompts, *traced(conversation, steps))]
    wrong = [_wrong_path(lm, prompts, paths[0])]
    limit = lm.config.max_position_embeddings
    note = f"; {steps} steps after prompts of {', '.join(str(len(p)) for p in prompts)} tokens"
    if paths[0].first_apart() is None and limit > max(map(len, prompts)) + steps:
        computed = _affordable(lm)
        paths.append(_edge(lm, steps) if computed else _edge_after_noise(lm, steps))
        wrong.append("the cache is wrong at the context's edge")
        note += f", and up to the context's edge at {limit:,}"
        note += "" if computed else " (after a random cache: computing so long a prefix takes too long here)"
    return _verdict(name, lm, paths, wrong, note)


def endless(lm: LM, rows: int, tokens: int) -> generate.Conversation:
    """The real generator, greedy, without stop tokens."""
    generator = generate.Generator(
        lm.config, lm.generator.params, real_ids=lm.real_ids, stop_ids=(), dtype=lm.generator.dtype
    )
    return conversation_of(generator, rows, tokens, GenerationSettings())


def conversation_of(
    generator: generate.Generator, rows: int, tokens: int, settings: GenerationSettings
) -> generate.Conversation:
    """A conversation with the cache that `Generator.stream` would make for `tokens` a row."""
    cache = kv.empty(generator.config, kv.bucket(rows, 1), kv.bucket(tokens), generator.dtype)
    return generate.Conversation(generator, cache, settings, [settings.seed] * rows)


def traced(conversation: generate.Conversation, steps: int) -> tuple[list[list[int]], np.ndarray]:
    """Generate one token at a time: each row's ids, and logits (B, steps + 1, V) before the first and after each.

    A stop id ends a row's turn, and the next step goes on after it.
    """
    rows = conversation.rows
    ids: list[list[int]] = [[] for _ in range(rows)]
    # Copied at once: the next step takes the buffer.
    logits = [np.array(conversation.logits)[:rows]]
    for _ in range(steps):
        (new,) = conversation.generate([1] * rows)
        for row, more in zip(ids, new, strict=True):
            row += more
        logits.append(np.array(conversation.logits)[:rows])
    return ids, np.stack(logits, axis=1)


def _ragged(lm: LM, prompts: list[list[int]], ids: list[list[int]], logits: np.ndarray) -> Measured:
    """The trace beside one padded forward; padding comes last, so causality hides it."""
    T = max(len(prompt) + len(new) for prompt, new in zip(prompts, ids, strict=True))
    padded = np.zeros((len(prompts), T), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts, ids, strict=True)):
        padded[row, : len(prompt) + len(new)] = prompt + new
    whole = lm.logits(padded)
    places = np.array([len(prompt) - 1 for prompt in prompts])[:, None] + np.arange(logits.shape[1])
    reference = np.take_along_axis(whole, places[..., None], axis=1)
    noise = measured(whole, lm.config, lm.params, jnp.asarray(padded), tail=T)
    return Measured("cached generation", logits, reference, noise)


def _wrong_path(lm: LM, prompts: list[list[int]], trace: Measured) -> str:
    """Step 0 comes from prefill alone; later, a fresh prefill of the same tokens tells."""
    at = trace.first_apart()
    if at is None or at[0] > 0:
        return "prefill agrees, so the cache update is wrong"
    return "prefill is wrong"


def _affordable(lm: LM) -> bool:
    """Whether whole forwards over the full context fit into memory and a user's patience."""
    limit = lm.config.max_position_embeddings
    flops = flops_per_token(lm.config, limit) / 3 * limit
    patient = jax.default_backend() != "cpu" or flops <= AFFORDABLE_FLOPS
    return patient and 4 * lm.config.num_attention_heads * limit**2 <= AFFORDABLE_SCORES


def _edge(lm: LM, steps: int) -> Measured:
    """Steps that end with the context full, against a forward of the whole context."""
    limit = lm.config.max_position_embeddings
    prompt = np.random.default_rng(2).integers(0, lm.real_ids, limit - steps).tolist()
    conversation = endless(lm, 1, limit)
    conversation.append([prompt])
    (ids,), logits = traced(conversation, steps)
    whole = jnp.asarray([prompt + ids], jnp.int32)
    reference = np.asarray(uncached(lm.config, lm.params, whole, tail=steps + 1))
    noise = measured(reference, lm.config, lm.params, whole, tail=steps + 1)
    return Measured("generation at the context's edge", logits, reference, noise)


def _edge_after_noise(lm: LM, steps: int) -> Measured:
    """Steps that end with the context full, after a random cache, against the same tokens at once."""
    limit = lm.config.max_position_embeddings
    conversation = endless(lm, 1, limit)
    start = _random_cache(conversation.cache, limit - steps - 1)
    conversation.cache = jax.tree.map(jnp.copy, start)
    conversation.lengths = np.array([limit - steps - 1])
    conversation.append([[0]])
    (ids,), logits = traced(conversation, steps)
    tokens, counts = jnp.asarray([[0, *ids]], jnp.int32), jnp.array([steps + 1])
    both = [cached(lm.config, lm.params, start, tokens, counts, moved=moved)[0] for moved in (False, True)]
    reference, moved = map(np.asarray, both)
    return Measured("generation at the context's edge", logits, reference, float(distance(reference, moved).max()))


def _random_cache(cache: kv.KVCache, tokens: int) -> kv.KVCache:
    def random(buffer: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(0), buffer.shape, buffer.dtype)

    keys, values = jax.tree.map(random, (cache.keys, cache.values))
    return kv.KVCache(keys, values, jnp.array([tokens], jnp.int32))
