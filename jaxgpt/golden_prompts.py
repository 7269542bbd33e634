"""Golden prompts: what a checkpoint answered where it was made, kept beside its weights as its proof.

`golden.json` holds a few prompts, the ids that greedy decoding continued them with, how
close each of those decisions was, and a fingerprint of the logits. `jaxgpt check` asks
again (`jaxgpt.checks.golden`), on any machine. The file also goes with an export, where
any framework can be held against it: see docs/interoperability.md.

The fingerprint is twofold. SHA-256 of the logits' bits sees any change, where nothing
that rounds has changed. A sketch of 32 numbers a place tells how far two sets of logits
are apart where it has: projections on random signs keep distances (Johnson &
Lindenstrauss 1984; signs: Achlioptas 2003).
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jaxtyping import Array, Float, Int

import jaxgpt
from jaxgpt import cache as kv
from jaxgpt import checkpoint, device, model, step_folder, step_rewrite
from jaxgpt.cache import KVCache
from jaxgpt.chat import TurnTemplate
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.lm import LM
from jaxgpt.step_folder import GOLDEN

VERSION = 1
STEPS = 16
"""Greedy steps, unless the context is shorter."""
TEXTS = ("Once upon a", "def f(x):\n", "Zürich 日本")
"""Prose, code, and characters of two and three bytes; short, so that one small program answers all."""
QUESTION = "Hi"
"""Asked in the place of the code where a template of turns gives the model conversations."""
RANDOM = (12, 5, 9, 14)
"""Lengths of prompts of random ids: the first beside the texts, all where there is no tokenizer."""
WIDTH = 4
"""Tokens of each prompt that are read at a time."""
SKETCH = 32
"""Numbers a sketch has: a distance told from them is right within a quarter, mostly."""
TOP = 8
"""Likeliest ids whose logits are written down, for people."""

Prompt = str | list[dict[str, str]] | None
"""Text, messages, or None for random ids: what `LM.encode` takes."""


@dataclass(frozen=True)
class Place:
    """The logits after so many greedy ids."""

    step: int
    top_ids: list[int]
    top_logits: list[float]
    sketch: list[float]
    """See `sketch`."""


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt and what the model made of it."""

    prompt: Prompt
    ids: list[int]
    """Of the prompt."""
    greedy: list[int]
    """The likeliest continuation; it goes on after a stop token."""
    text: str | None
    """Of `greedy`, for people."""
    margins: list[float]
    """How far ahead each of `greedy` was of the next best id, in logits."""
    places: list[Place]
    sha256: str
    """Of the float32 logits (S + 1, V), before each of the S steps and after the last."""


@dataclass(frozen=True)
class Golden:
    """What golden.json says."""

    version: int
    compute_dtype: str
    vocab_size: int
    """V, padding included."""
    made_on: dict[str, str | int]
    """See `surroundings`."""
    prompts: list[GoldenPrompt]

    def spelled(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


# -- What is asked, and where ----------------------------------------------------------


def surroundings() -> dict[str, str | int]:
    """All that decides how sums round: with the same of it, a CPU gives the same bits."""
    return {
        "device": device.describe(),
        "backend": jax.default_backend(),
        "processor": _processor(),
        # A matrix product is shared out among them, and what is shared out is added in another order.
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "flags": hashlib.sha256(os.environ.get("XLA_FLAGS", "").encode()).hexdigest()[:16],
        "jaxgpt": jaxgpt.__version__,
        **{name: version(name) for name in ("jax", "jaxlib")},
    }


def _processor() -> str:
    """Its name and a digest of what it can: XLA compiles for both."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())  # of the first of them
    features = " ".join(sorted(facts.get("flags", facts.get("Features", "")).split()))
    name = facts.get("model name", platform.machine())
    return f"{name} {hashlib.sha256(features.encode()).hexdigest()[:8]}"


def exactly() -> AbstractContextManager[Any]:
    """A GPU multiplies float32 in full: golden prompts of one are asked on others."""
    return nullcontext() if jax.default_backend() == "cpu" else jax.default_matmul_precision("highest")


def sketch(logits: Float[np.ndarray, "... V"]) -> Float[np.ndarray, "... 32"]:
    """Projections of logits on 32 vectors of signs, over the square root of V, in float64.

    The mean of the squared difference of two sketches is, but for chance, the mean of
    the squared difference of the logits. Number n of the V signs of row k is by the bit
    16 of x, made of x = n + 0x9E3779B9 (k + 1) by two rounds of x = (x ^ (x >> 15)) m, m =
    0x85EBCA6B and 0xC2B2AE35, and a last x = x ^ (x >> 15), all modulo 2**32; 1 is plus.
    """
    V = logits.shape[-1]
    rows = (np.arange(1, SKETCH + 1, dtype=np.uint64) * 0x9E3779B9 % 2**32).astype(np.uint32)
    x = np.arange(V, dtype=np.uint32) + rows[:, None]
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 15)) * np.uint32(multiplier)
    signs = np.where((x ^ (x >> 15)) >> 16 & 1, 1.0, -1.0)
    return logits.astype(np.float64) @ signs.T / np.sqrt(V)


def _prompts(lm: LM, room: int) -> list[tuple[Prompt, list[int]]]:
    """What is asked, with its ids; only what leaves room for the answer."""
    found: list[tuple[Prompt, list[int]]] = []
    if lm.tokenizer is not None:
        asked: list[Prompt] = [*TEXTS]
        # An imported template is a program, and some write the date.
        if isinstance(lm.template, TurnTemplate) and "user" in lm.template.roles:
            asked[1] = [{"role": "user", "content": QUESTION}]
        found = [(prompt, ids) for prompt in asked if len(ids := encoded(lm, prompt)) <= room]
    rng = np.random.default_rng(0)
    for length in RANDOM[: 1 if found else None]:
        found.append((None, rng.integers(0, lm.real_ids, min(length, room)).tolist()))
    return found


def encoded(lm: LM, prompt: Prompt) -> list[int]:
    """Ids of a prompt, as every command gives them to the model."""
    given: Any = prompt
    return lm.encode(given)


# -- Asking ----------------------------------------------------------------------------


def ask(lm: LM, prompts: Sequence[Sequence[int]], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ids (B, S), and float32 logits (B, S + 1, V), of prompts given as ids.

    All goes through the forward with a cache, a few tokens at a time: one program, in a
    fraction of the time that the decode loop takes to compile, which is compared with
    whole forwards by `kv_cache_parity_steps_test`. The rows are one batch: in another
    shape the same sums may round otherwise.

    Raises:
        InputError: the logits are not finite.
    """
    rows, longest = len(prompts), max(map(len, prompts))
    cache = kv.empty(lm.config, rows, kv.bucket(longest + steps), lm.generator.dtype)
    logits = np.zeros((rows, lm.config.vocab_size), np.float32)
    with exactly():
        for pieces in _pieces(prompts):
            logits, cache = _read(lm, cache, pieces)
        ids, every = list[np.ndarray](), [logits]
        for _ in range(steps):
            ids.append(logits[:, : lm.real_ids].argmax(axis=-1))
            logits, cache = _read(lm, cache, [[int(i)] for i in ids[-1]])
            every.append(logits)
    found = np.stack(every, axis=1)
    if not np.isfinite(found).all():
        raise InputError("the model's logits are not finite")
    return np.stack(ids, axis=1), found


def _pieces(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The prompts in pieces that all end with the last: shorter ones begin later, with nothing before."""
    for left in range(-(-max(map(len, prompts)) // WIDTH), 0, -1):
        ends = [(len(prompt) - WIDTH * left, len(prompt) - WIDTH * (left - 1)) for prompt in prompts]
        yield [prompt[max(0, a) : max(0, b)] for prompt, (a, b) in zip(prompts, ends, strict=True)]


def _read(lm: LM, cache: KVCache, pieces: Sequence[Sequence[int]]) -> tuple[np.ndarray, KVCache]:
    padded = np.zeros((len(pieces), WIDTH), np.int32)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = piece
    counts = np.array([len(piece) for piece in pieces], np.int32)
    logits, cache = _last_logits(lm.config, lm.params, cache, jnp.asarray(padded), jnp.asarray(counts))
    return np.asarray(logits, np.float32), cache


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _last_logits(
    config: ModelConfig, params: model.Params, cache: KVCache, ids: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    output, cache = model.forward_cached(config, params, ids, counts, cache, last_only=True)
    return output.logits[:, 0], cache


def made(lm: LM) -> Golden:
    """Golden prompts of a loaded model.

    Raises:
        InputError: a context of fewer than 4 tokens, or logits that are not finite.
    """
    limit = lm.config.max_position_embeddings
    if limit < 4:
        raise InputError("the context is shorter than 4 tokens")
    steps = min(STEPS, limit // 2)
    prompts = _prompts(lm, limit - steps)
    ids, logits = ask(lm, [ids for _, ids in prompts], steps)
    rows = [
        _golden_prompt(lm, prompt, given, new.tolist(), row)
        for (prompt, given), new, row in zip(prompts, ids, logits, strict=True)
    ]
    return Golden(VERSION, lm.compute_dtype, lm.config.vocab_size, surroundings(), rows)


def _golden_prompt(lm: LM, prompt: Prompt, ids: list[int], greedy: list[int], logits: np.ndarray) -> GoldenPrompt:
    best = np.sort(logits[:-1, : lm.real_ids], axis=-1)
    margins = best[:, -1] - best[:, -2] if lm.real_ids > 1 else np.zeros(len(best))
    steps = len(greedy)
    places = [_place(step, logits[step], lm.real_ids) for step in sorted({0, steps // 2, steps})]
    text = lm.tokenizer.decode(greedy) if lm.tokenizer else None
    return GoldenPrompt(prompt, ids, greedy, text, [float(m) for m in margins], places, digest(logits))


def _place(step: int, logits: np.ndarray, real_ids: int) -> Place:
    top = np.argsort(-logits[:real_ids], kind="stable")[:TOP].tolist()
    return Place(step, top, [float(logits[i]) for i in top], [float(x) for x in sketch(logits)])


def digest(logits: Float[np.ndarray, "S V"]) -> str:
    """SHA-256 of the bits, little-endian, in row order."""
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()


# -- In a step's folder ----------------------------------------------------------------


def add(directory: str | Path) -> str | None:
    """Ask a saved step and write its answers into it, replacing those it has; a line to print where that failed.

    The step is loaded as for any use, but for its weights, which stay mapped: on a CPU
    that computes in the dtype they are stored in they take no memory of their own.

    Args:
        directory: a run folder (its newest step is taken) or one step's.

    Raises:
        InputError: as `checkpoint.load` does.
    """
    path = step_folder.latest(Path(directory).absolute())
    text, notice = answered(checkpoint.load(path, mapped=True))
    if text is None:
        return notice
    try:
        checkpoint.acknowledge(step_rewrite.prepared(path, GOLDEN, text), path)
    except OSError as error:
        return f"golden prompts were not written: {error.strerror or error}"
    return None


def answered(source: Checkpoint) -> tuple[str | None, str | None]:
    """The text of golden.json, or else the line to print: a model that answers nothing is worth saving nonetheless."""
    device.keep_programs()
    try:
        return made(LM(source)).spelled(), None
    except (InputError, JaxRuntimeError, MemoryError) as error:
        return None, f"no golden prompts: {' '.join(str(error).split())[:200]}"


def read(folder: Path) -> Golden | None:
    """The golden prompts beside a model, None where there are none.

    Raises:
        InputError: the file is not what jaxgpt writes.
    """
    content = step_folder.document(folder, GOLDEN)
    if content is None:
        return None
    if content.get("version") != VERSION:
        raise InputError(f"{GOLDEN} has version {content.get('version')!r}; this jaxgpt reads {VERSION}")
    try:
        values: dict[str, Any] = {**content, "prompts": [_read_prompt(row) for row in content["prompts"]]}
        golden = Golden(**values)
        sound = bool(golden.prompts) and all(_is_sound(row, golden.vocab_size) for row in golden.prompts)
    except (KeyError, TypeError, ValueError):
        sound, golden = False, None
    if not sound or golden is None:
        raise InputError(
            f"{GOLDEN} is not what jaxgpt writes; restore it, or take it out of the folder and its manifest"
        )
    return golden


def _read_prompt(row: dict[str, Any]) -> GoldenPrompt:
    places = [Place(**place) for place in row["places"]]
    values: dict[str, Any] = {**row, "places": places}
    return GoldenPrompt(**values)


def _is_sound(row: GoldenPrompt, vocab_size: int) -> bool:
    """Shapes and ranges that a replay relies on."""
    steps = len(row.greedy)
    ids = [*row.ids, *row.greedy, *(i for place in row.places for i in place.top_ids)]
    numbers = [*row.margins, *(x for place in row.places for x in (*place.sketch, *place.top_logits))]
    return (
        all(type(i) is int and 0 <= i < vocab_size for i in ids)
        and all(type(x) in (int, float) for x in numbers)
        and len(row.ids) > 0
        and 0 < steps == len(row.margins)
        and bool(row.places)
        and all(type(p.step) is int and 0 <= p.step <= steps and len(p.sketch) == SKETCH for p in row.places)
    )
