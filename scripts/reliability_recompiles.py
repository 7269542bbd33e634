"""What compiles after a warm-up: 50 ragged generations with every knob varied, 50 turns of a chat; then one that must.

    python scripts/reliability_recompiles.py [--preset tiny]

Counts XLA's own compilations (`jax.monitoring`), eager operations included. Exit code 1
where one of the warmed sizes compiles, or where the control does not.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

from jaxgpt import cache, transformer
from jaxgpt.buckets import Buckets
from jaxgpt.generate import CHUNK, Conversation, Generator, Row
from jaxgpt.generation_settings import GenerationSettings
from jaxgpt.presets import PRESETS

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """How many there were since this was made, or since `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == COMPILED

    def reset(self) -> int:
        """The count, which begins again."""
        found, self.count = self.count, 0
        return found


def varied(number: int) -> GenerationSettings:
    """Every knob another value each time, on and off."""
    return GenerationSettings(
        temperature=0.1 * (number % 12),
        top_k=number % 7,
        top_p=1.0 - 0.01 * number,
        min_p=0.005 * number,
        repetition_penalty=1.0 + 0.02 * (number % 5),
        no_repeat_ngram_size=number % 4,
        seed=number,
        logprobs=number % 2 == 1,
    )


def generations(made: Generator, vocabulary: int) -> None:
    """Fifty, of one row or two, each of its own length."""
    rng = np.random.default_rng(0)
    for number in range(50):
        prompts = [rng.integers(0, vocabulary, rng.integers(1, 33)).tolist() for _ in range(1 + number % 2)]
        rows = [Row(ids, int(rng.integers(1, 60)), number) for ids in prompts]
        for _ in made.chunks(rows, varied(number), 1 + number % CHUNK):
            pass


def turns(made: Generator, vocabulary: int) -> None:
    """Fifty of one conversation, with a reply taken back now and then."""
    rng = np.random.default_rng(1)
    talk = Conversation(made, cache.empty(made.config, 1, 64, made.dtype), varied(0), [0])
    for number in range(50):
        talk.configure(varied(number), [number])
        if number % 5 == 0:
            talk.forget([0])
        talk.append([rng.integers(0, vocabulary, rng.integers(1, 12)).tolist()])
        list(talk.generate([int(rng.integers(1, 12))]))


def main() -> int:
    """Warm up, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    config = dataclasses.replace(PRESETS[parser.parse_args().preset], max_position_embeddings=128)
    made = Generator(config, transformer.init(config, 0), real_ids=config.vocab_size, stop_ids=[], dtype="float32")
    buckets, compiled = Buckets.upto(batch=2, prompt=32, tokens=128), Compilations()
    made.warm_up(buckets)
    warm = compiled.reset()
    generations(made, config.vocab_size)
    ragged = compiled.reset()
    turns(made, config.vocab_size)
    chat = compiled.reset()
    for _ in made.chunks([Row([1] * 33, 5, 0)], GenerationSettings(), CHUNK):
        pass
    unwarmed = compiled.reset()
    print(f"{buckets}\n")
    print("| what | programs compiled |\n| --- | --- |")
    print(f"| warm-up | {warm} (bound {buckets.programs}) |\n| 50 ragged generations, every knob varied | {ragged} |")
    print(f"| 50 turns of a chat | {chat} |\n| a prompt longer than was warmed up (control) | {unwarmed} |")
    found = {"warm_up": warm, "bound": buckets.programs, "ragged": ragged, "chat": chat, "control": unwarmed}
    print(json.dumps(found))
    return int(ragged + chat > 0 or not unwarmed or warm > buckets.programs)


if __name__ == "__main__":
    sys.exit(main())
