"""`jaxgpt bench`: decode and prefill speed, time to first token, use of the device."""

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
    from jaxgpt import device, device_memory
    from jaxgpt.loading import load

    with waiting("loading"):
        loaded = load(settings.directory, device=settings.device, compute_dtype=settings.compute_dtype)
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
    recompiled, peak = compiled.count, device_memory.peak()
    decode = statistics.median((settings.max_tokens - 1) / timing.decode for timing in timings)
    prefill = statistics.median(len(prompt) / timing.prefill for timing in timings)
    result: dict[str, Any] = {
        "device": device.describe(),
        "compute_dtype": loaded.compute_dtype,
        "iterations": settings.iterations,
        "prompt_tokens": len(prompt),
        "max_tokens": settings.max_tokens,
        "decode_tokens_per_second": round(decode, 2),
        "prefill_tokens_per_second": round(prefill, 2),
        "time_to_first_token_seconds": round(statistics.median(t.first_token for t in timings), 5),
        **_use_of_the_device(loaded, decode, prefill, len(prompt), settings.max_tokens),
        "peak_memory_bytes": peak,
        "compile_count": warm_up,
        "compile_count_after_warm_up": recompiled,
        "floor": settings.floor,
        "passed": settings.floor is None or decode >= settings.floor,
    }
    output.result(result)
    if not result["passed"]:
        output.note(f"{decode:,.1f} tokens/s are below the floor of {settings.floor:g}")
    return 0 if result["passed"] else 1


def _use_of_the_device(loaded: "LM", decode: float, prefill: float, prompt: int, count: int) -> dict[str, Any]:
    """Bandwidth and arithmetic reached, and their share of the device's own.

    Bandwidth: what decoding a token has to read, times tokens a second, against a copy measured
    in this run. MFU: FLOPs of the forward against the data sheet's bf16 peak, or where there is
    none, as for every CPU, against a matrix product measured in this run.
    """
    import jax.numpy as jnp

    from jaxgpt import device, device_rates, flops

    attended = prompt + count / 2
    read = flops.bytes_per_decoded_token(loaded.config, attended, jnp.dtype(loaded.compute_dtype).itemsize)
    copy, known = device_rates.copy_rate(), flops.peak(device.describe())
    peak = known or device_rates.matmul_rate(loaded.compute_dtype)
    decoding = decode * flops.forward_flops_per_token(loaded.config, attended)
    # Each token of the prompt attends to those before it: half of them on average.
    reading = prefill * flops.forward_flops_per_token(loaded.config, prompt / 2)
    return {
        "bytes_read_per_token": round(read),
        "memory_bandwidth_gb_per_second": round(read * decode / 1e9, 3),
        "copy_bandwidth_gb_per_second": round(copy / 1e9, 3),
        "memory_bandwidth_use": round(read * decode / copy, 4),
        "decode_mfu": round(decoding / peak, 4),
        "prefill_mfu": round(reading / peak, 4),
        "peak_flops_per_second": round(peak),
        "peak_flops_are": "the data sheet's, bf16" if known else f"a {loaded.compute_dtype} product measured here",
    }


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
