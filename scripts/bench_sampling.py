"""Full sampling against greedy decoding: the same steps, alternating in one run.

Random weights of a model with a vocabulary as large as Qwen2's; every knob on, one of
them alone, and the sampling function without the model. The median ratio of paired runs
is the figure to quote, because a shared machine's speed drifts; beside it that of the CPU
time of all threads, which other programs disturb less. Prints one JSON line last.

    python scripts/bench_sampling.py            # Qwen2-0.5B's widths with 2 layers, batches 1 and 8
    python scripts/bench_sampling.py --hidden 64 --batch 8
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import cache as kv
from jaxgpt import device, model, sampling, transformer
from jaxgpt.generate import Conversation, Generator
from jaxgpt.presets import PRESETS
from jaxgpt.settings import GenerationSettings

FULL = GenerationSettings(
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.1,
    no_repeat_ngram_size=3,
    logprobs=True,
)
"""Every knob on, log-probabilities too."""
OTHERS = {
    "temperature": GenerationSettings(temperature=0.8),
    "top_p": GenerationSettings(temperature=0.8, top_p=0.9),
    "top_k_beyond_columns": GenerationSettings(temperature=0.8, top_k=1000),
}
"""One at a time: the nucleus of random weights holds most of the vocabulary; k is beyond the quick search."""


class Steps:
    """Decode steps of one model with given settings, again and again from the same prompt."""

    def __init__(self, generator: Generator, batch: int, prompt: int, settings: GenerationSettings, new: int):
        self.new, self.batch = new, batch
        rng = np.random.default_rng(0)
        self.prompts: list[list[int]] = rng.integers(0, generator.config.vocab_size, (batch, prompt)).tolist()
        cache = kv.empty(generator.config, batch, kv.bucket(prompt + new), generator.dtype)
        self.conversation = Conversation(generator, cache, settings, list(range(batch)))

    def seconds(self) -> tuple[float, float]:
        """Of one step: by the clock, and of CPU time."""
        self.conversation.forget([0] * self.batch)
        self.conversation.append(self.prompts)
        jax.block_until_ready(self.conversation.logits)
        started, used = time.perf_counter(), time.process_time()
        for _ in self.conversation.generate([self.new] * self.batch):
            pass
        return (time.perf_counter() - started) / self.new, (time.process_time() - used) / self.new


class Sampling:
    """`sampling.sample` alone, on the logits a step would have."""

    def __init__(self, steps: Steps, size: int):
        talk = steps.conversation
        self.logits = 2 * jax.random.normal(jax.random.key(0), (steps.batch, size))
        self.given = jnp.ones(size, bool), talk.knobs, sampling.History(talk.said, talk.cache.lengths)
        self.sample = jax.jit(sampling.sample)

    def seconds(self) -> tuple[float, float]:
        """Of one call: by the clock, and of CPU time."""
        started, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(self.sample(self.logits, *self.given))
        return time.perf_counter() - started, time.process_time() - used


def compared(runs: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, and the median ratio of each to greedy over paired rounds."""
    for run in runs.values():
        run()  # compiles
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    result: dict[str, Any] = {name: {} for name in runs}
    for place, what in enumerate(("", "cpu_")):
        for name in runs:
            ratios = (each[name][place] / each["greedy"][place] for each in times)
            milliseconds = 1e3 * statistics.median(each[name][place] for each in times)
            result[name][f"{what}milliseconds"] = round(milliseconds, 3)
            result[name][f"{what}ratio_to_greedy"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=None, help="another width, with 2 heads")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="greedy and full alone")
    args = parser.parse_args()
    device.use(args.device)
    config = dataclasses.replace(
        PRESETS["qwen2-0.5b"], vocab_size=args.vocabulary, num_hidden_layers=args.layers, max_position_embeddings=2048
    )
    if args.hidden:
        narrow = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "head_dim": args.hidden // 2}
        config = dataclasses.replace(config, **narrow, num_attention_heads=2, num_key_value_heads=1)
    params = model.cast(transformer.init(config, 0), args.dtype)
    generator = Generator(config, params, real_ids=config.vocab_size, stop_ids=(), dtype=jnp.dtype(args.dtype))
    result: dict[str, Any] = {
        "benchmark": "sampling",
        "device": device.describe(),
        "jax": jax.__version__,
        "vocabulary": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "steps": args.new,
    }
    for batch in args.batch:
        chosen = {"greedy": GenerationSettings(), "full": FULL, **({} if args.quick else OTHERS)}
        steps = {name: Steps(generator, batch, args.prompt, given, args.new) for name, given in chosen.items()}
        whole = compared({name: each.seconds for name, each in steps.items()}, args.rounds)
        alone = {name: Sampling(each, config.vocab_size).seconds for name, each in steps.items()}
        result[f"batch_{batch}"] = {"step": whole, "sampling_alone": compared(alone, 5 * args.rounds)}
        print(f"batch {batch}: {whole}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
