"""`jaxgpt bench`: decode and prefill speed, time to first token."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError
from jaxgpt.settings import BenchSettings, GenerationSettings
from jaxgpt.verbs.output import Output, waiting

if TYPE_CHECKING:
    from jaxgpt.generate import Generator
    from jaxgpt.lm import LM

LONGEST_PROMPT = 512


@dataclass(frozen=True)
class _Timing:
    """Seconds of one run."""

    prefill: float
    first_token: float
    decode: float
    """Of all tokens after the first."""


def bench(settings: BenchSettings, output: Output) -> int:
    """Measure; the last line of stdout is JSON. Exit code 1 below the floor."""
    from jaxgpt import device, lm

    with waiting("loading"):
        loaded = lm.load(settings.directory, device=settings.device, compute_dtype=settings.compute_dtype)
    settings = settings if "--max-tokens" in output.given else _within_context(loaded, settings)
    prompt = _prompt(loaded, settings)
    compiled = _CompileCount()
    generator = _endless(loaded)
    with waiting("compiling"):
        _run(generator, prompt, settings.max_tokens)
    warm_up, compiled.count = compiled.count, 0
    timings: list[_Timing] = []
    for number in range(1, settings.iterations + 1):
        timing = _run(generator, prompt, settings.max_tokens)
        timings.append(timing)
        rate = (settings.max_tokens - 1) / timing.decode
        output.note(f"run {number}/{settings.iterations}: {rate:,.1f} tokens/s, first after {timing.first_token:.3f} s")
    decode = statistics.median((settings.max_tokens - 1) / timing.decode for timing in timings)
    result: dict[str, Any] = {
        "device": device.describe(),
        "compute_dtype": loaded.compute_dtype,
        "iterations": settings.iterations,
        "prompt_tokens": len(prompt),
        "max_tokens": settings.max_tokens,
        "decode_tokens_per_second": round(decode, 2),
        "prefill_tokens_per_second": round(statistics.median(len(prompt) / t.prefill for t in timings), 2),
        "time_to_first_token_seconds": round(statistics.median(t.first_token for t in timings), 5),
        "compile_count": warm_up,
        "compile_count_after_warm_up": compiled.count,
        "floor": settings.floor,
        "passed": settings.floor is None or decode >= settings.floor,
    }
    output.result(result)
    return 0 if result["passed"] else 1


def _within_context(loaded: "LM", settings: BenchSettings) -> BenchSettings:
    """As many tokens as asked for; those that nobody asked for fill half of a short context."""
    limit = loaded.config.max_position_embeddings
    if settings.max_tokens != BenchSettings.max_tokens or settings.max_tokens < limit:
        return settings
    return dataclasses.replace(settings, max_tokens=max(2, limit // 2))


def _prompt(loaded: "LM", settings: BenchSettings) -> list[int]:
    """Random tokens: half of what the context leaves, so that attention has work to do."""
    import numpy as np

    limit = loaded.config.max_position_embeddings
    if settings.max_tokens >= limit:
        raise InputError(f"max_tokens {settings.max_tokens:,} fills the context of {limit:,}; lower --max-tokens")
    length = max(1, min(LONGEST_PROMPT, (limit - settings.max_tokens) // 2))
    return [int(i) for i in np.random.default_rng(0).integers(0, loaded.real_ids, length)]


def _endless(loaded: "LM") -> "Generator":
    """The model without stop tokens: every run generates as many."""
    from jaxgpt.generate import Generator

    return Generator(loaded.config, loaded.params, real_ids=loaded.real_ids, stop_ids=(), dtype=loaded.compute_dtype)


def _run(generator: "Generator", prompt: list[int], count: int) -> _Timing:
    from jaxgpt import cache as kv
    from jaxgpt.generate import Conversation

    # The whole cache at once: growing it is not what is measured.
    cache = kv.empty(generator.config, 1, kv.bucket(len(prompt) + count), generator.dtype)
    conversation = Conversation(generator, cache, GenerationSettings(), [0])
    started = time.perf_counter()
    conversation.append([prompt])
    assert conversation.logits is not None
    conversation.logits.block_until_ready()
    prefilled = time.perf_counter()
    for _ in conversation.generate([1]):
        pass
    first = time.perf_counter()
    for _ in conversation.generate([count - 1]):
        pass
    return _Timing(prefilled - started, first - started, time.perf_counter() - first)


class _CompileCount:
    """Programs that XLA compiled, or loaded from the compilation cache, since it was made."""

    def __init__(self) -> None:
        import jax.monitoring

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
