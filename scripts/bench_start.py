"""How long until the first word: `jaxgpt generate` on GPT-2 124M from a cold and from a kept compilation cache.

Each start is a new process; the time runs from its start until the first byte of the
answer is on its stdout, which is a terminal's. In turn with them, Python that imports JAX and
adds three numbers, which says how fast the machine is just then. Also `jaxgpt --help`. One
JSON line last.

    python scripts/bench_start.py [--starts 5]
"""

import argparse
import dataclasses
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import checkpoint, transformer
from jaxgpt.chat import PLAIN
from jaxgpt.presets import PRESETS
from jaxgpt.step_folder import Contents
from jaxgpt.tokenizer import Tokenizer


def saved(folder: Path, preset: str) -> Path:
    """A checkpoint with random weights and GPT-2's vocabulary."""
    tokenizer = Tokenizer.create("gpt2", template=PLAIN)
    config = dataclasses.replace(PRESETS[preset], vocab_size=tokenizer.model_vocab_size)
    contents = Contents(
        config=config,
        params=transformer.init(config, 0),
        stage="base",
        compute_dtype="float32",
        eos_token_ids=[],
        tokenizer=tokenizer,
        template=None,
        provenance={},
    )
    checkpoint.save(folder, 0, contents).result()
    return folder


JAX_ALONE = ("-c", "import jax; print(jax.numpy.zeros(3).sum())")


def first_byte(words: Sequence[str], cache: Path) -> float:
    """Seconds from a Python's start with these arguments until it writes something to its terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "TERM": "dumb"}
    started = time.perf_counter()
    command = [sys.executable, *words]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        read = os.read(ours, 1)
        seconds = time.perf_counter() - started
        assert read, f"{command} wrote nothing"
        process.kill()
    os.close(ours)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--starts", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, cache = saved(Path(place) / "model", args.preset), Path(place) / "cache"
        words = ["-m", "jaxgpt.cli", "generate", str(folder), "The quick brown fox", "--max-new-tokens", "16"]
        # The first fills the cache: it must live until its programs are written.
        filled = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(place) / "cache")},
            capture_output=True,
        )
        assert filled.returncode == 0, filled.stderr.decode()
        pairs = [(first_byte(words, cache), first_byte(JAX_ALONE, cache)) for _ in range(args.starts)]
        later, alone = map(list, zip(*pairs, strict=True))
        cold = first_byte(words, Path(place) / "empty")
        usage = [first_byte(["-m", "jaxgpt.cli", "--help"], cache) for _ in range(args.starts)]
    found = {
        "preset": args.preset,
        "first_start": round(cold, 2),
        "later_starts": [round(seconds, 2) for seconds in later],
        "jax_alone": [round(seconds, 2) for seconds in alone],
        "help": [round(seconds, 3) for seconds in usage],
    }
    print(f"first start to first token {cold:.2f} s, later ones {statistics.median(later):.2f} s (wanted 4)")
    print(f"importing JAX and adding three numbers {statistics.median(alone):.2f} s")
    print(f"jaxgpt --help {statistics.median(usage):.2f} s (wanted 0.4)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
