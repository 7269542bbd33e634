"""Damage to checkpoints: seeded mutations of a step's files, none of which may load.

A run folder holds two steps with parameters, training state, tokenizer and template. Of the newer one a
file is chosen, any of them in turn, and flipped (one bit), truncated, zeroed (a part of it),
deleted, or swapped with another file of the step. Then

- `load` must refuse, naming the file, before any array is read;
- `load` as `--resume` calls it must give the older step, say so, and set the damaged one aside.

Exit 1 where anything else happens.

    python scripts/reliability_damage.py               # 2,000 mutations
    python scripts/reliability_damage.py --count 200 --seed 7
"""

# A private function is what must not be reached.
# pyright: reportPrivateUsage=false

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from jaxgpt import checkpoint, manifest, weights
from jaxgpt.chat import CHATML
from jaxgpt.checkpoint import CheckpointError, Contents
from jaxgpt.config import LLAMA_STYLE, ModelConfig
from jaxgpt.tokenizer import Tokenizer

OLD, NEW = 100, 200
NEWEST = "step-00000200"


def contents(step: int) -> Contents:
    """A tiny model; arrays differ between the steps, and from each other."""
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=["hello world"])
    config = ModelConfig(
        **LLAMA_STYLE,
        vocab_size=tokenizer.model_vocab_size,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=2,
        max_position_embeddings=16,
    )
    normal = np.random.default_rng(step).standard_normal
    params = {p.name: normal(p.shape, np.float32) for p in weights.parameters(config)}
    moments = {f"0.mu.{name}": normal(array.shape, np.float32) for name, array in params.items()}
    return Contents(
        config=config,
        params=params,
        stage="base",
        compute_dtype="float32",
        eos_token_ids=[1],
        tokenizer=tokenizer,
        template=CHATML,
        provenance={},
        train={**moments, "1": np.int32(step), "2": np.array([0, 7], np.uint32)},
        train_json={"step": step},
    )


def two_steps(folder: Path) -> Path:
    """A run folder with both steps."""
    for step in (OLD, NEW):
        checkpoint.save(folder, step, contents(step)).result()
    return folder


# -- Mutations -------------------------------------------------------------------------


def flipped(data: bytes, random_: random.Random) -> bytes:
    """One bit."""
    at, found = random_.randrange(len(data)), bytearray(data)
    found[at] ^= 1 << random_.randrange(8)
    return bytes(found)


def truncated(data: bytes, random_: random.Random) -> bytes:
    """Somewhere, perhaps to nothing."""
    return data[: random_.randrange(len(data))]


def zeroed(data: bytes, random_: random.Random) -> bytes:
    """From a byte that was not zero on, as a file system does with blocks it lost."""
    at = random_.choice([i for i, byte in enumerate(data) if byte])
    length = random_.randint(1, len(data) - at)
    return data[:at] + bytes(length) + data[at + length :]


REWRITTEN: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "truncated": truncated,
    "zeroed": zeroed,
}
KINDS = (*REWRITTEN, "deleted", "swapped")


def mutate(step: Path, kind: str, name: str, random_: random.Random) -> list[str]:
    """Damage a file of the step; the files that are damaged, or nothing where that kind cannot be done to it."""
    path = step / name
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "swapped":
        others = [n for n, p in sorted(manifest.files(step).items()) if p.read_bytes() != data]
        other = random_.choice(others)
        path.write_bytes((step / other).read_bytes())
        (step / other).write_bytes(data)
        return [name, other]
    elif not data or (kind == "zeroed" and not any(data)):
        return []
    else:
        path.write_bytes(REWRITTEN[kind](data, random_))
    return [name]


# -- What must happen ------------------------------------------------------------------


class Trial:
    """One run folder, damaged and restored again and again."""

    def __init__(self, folder: Path, seed: int):
        self.run = two_steps(folder / "run")
        self.step = self.run / NEWEST
        self.whole = Path(shutil.copytree(self.step, folder / "whole"))
        self.random = random.Random(seed)
        self.names = sorted(manifest.files(self.whole))
        self.expected = checkpoint.load(self.run, train=True, step=OLD)
        self.done: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []

    def mutations(self, count: int) -> None:
        """So many of them; each kind, and each file with it, in turn."""
        number = 0
        while self.done.total() < count:
            kind, name = KINDS[number % len(KINDS)], self.names[number // len(KINDS) % len(self.names)]
            number += 1
            damaged = mutate(self.step, kind, name, self.random)
            if damaged:
                self.done[kind] += 1
                self.problems += [f"{' and '.join(damaged)} {kind}: {text}" for text in self._check(damaged)]
                self._restore(damaged)

    def _restore(self, damaged: Sequence[str]) -> None:
        aside = self.step.with_name(f"{NEWEST}.damaged")
        if aside.exists():
            aside.rename(self.step)
        for name in damaged:
            shutil.copyfile(self.whole / name, self.step / name)

    def _check(self, damaged: Sequence[str]) -> list[str]:
        problems: list[str] = []
        named = tuple(f"checkpoint step {NEW}: {name} " for name in damaged)
        try:
            loaded = without_arrays(lambda: checkpoint.load(self.run, train=True))
            problems.append(f"loaded as step {loaded.step}")
        except CheckpointError as error:
            if not str(error).startswith(named):
                problems.append(f"another file is named: {error}")
        found = checkpoint.load(self.run, train=True, fallback=True, mapped=True)
        alike = same(found.params, self.expected.params) and same(found.train, self.expected.train)
        if found.step != OLD or not alike:
            problems.append(f"resume took step {found.step}")
        notice = found.notices[0] if len(found.notices) == 1 else ""
        if not notice.startswith(named) or not notice.endswith(f"; using verified step {OLD}"):
            problems.append(f"resume said {found.notices}")
        if checkpoint.steps(self.run) != [OLD]:
            problems.append("the damaged step still counts")
        return problems


def without_arrays(load: Callable[[], Any]) -> Any:
    """Call with Orbax out of reach: damage is seen before arrays are read."""

    def read(path: Path, tree: str, headers: object) -> None:
        raise AssertionError(f"{tree} of {path} was read")

    plain, checkpoint._read_arrays = checkpoint._read_arrays, read
    try:
        return load()
    finally:
        checkpoint._read_arrays = plain


def same(found: Any, expected: Any) -> bool:
    """Whether two dicts of arrays are the same bits."""
    return found.keys() == expected.keys() and all(found[n].tobytes() == expected[n].tobytes() for n in expected)


def main() -> int:
    """Run the trial; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), asked.seed)
        trial.mutations(asked.count)
    print("| damage | mutations |\n| --- | --- |")
    for kind in KINDS:
        print(f"| {kind} | {trial.done[kind]} |")
    for problem in trial.problems:
        print(problem)
    result = {
        "mutations": trial.done.total(),
        "files": len(trial.names),
        "problems": len(trial.problems),
        "seed": asked.seed,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(result))
    return 1 if trial.problems else 0


if __name__ == "__main__":
    sys.exit(main())
