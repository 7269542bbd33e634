"""How well preflight foretells a run's memory: real runs of three shapes, each in a process of its own.

One shape is small, one has large activations, one large weights that are also saved in
the middle of the run. What was told before step 1 is compared with the most that the
process then had (resident memory; on a GPU, the most of JAX's pool). Prints one JSON
line last; exit code 1 where a ratio is outside 1/FACTOR to FACTOR.

    python scripts/preflight_accuracy.py
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

FACTOR = 1.25
"""How far the estimate may be from what was used, either way."""
SHAPES: dict[str, list[str]] = {
    "small": ["--batch-size", "8", "--sequence-length", "128"],
    "large activations": ["--batch-size", "64", "--sequence-length", "256", "--eval-batches", "2"],
    "large weights": [
        *("--hidden-size", "512", "--num-hidden-layers", "8", "--num-attention-heads", "8"),
        *("--batch-size", "2", "--sequence-length", "64", "--save-every", "2"),
    ],
}


def jaxgpt(*words: str) -> str:
    """A command's stdout."""
    done = subprocess.run([sys.executable, "-m", "jaxgpt", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def corpus(folder: Path) -> Path:
    """Token shards of made-up text, enough for every shape."""
    rng = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "epsilon"]
    rows = (" ".join(rng.choices(names, k=400)) for _ in range(400))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    jaxgpt("data", "encode", str(folder / "text.jsonl"), "--out", str(folder / "data"), "--tokenizer", "char")
    return folder / "data"


def measured(data: Path, out: Path, words: list[str]) -> dict[str, Any]:
    """Estimate and peak of four steps, in bytes."""
    common = ["--data", str(data), "--out", str(out), "--preset", "tiny", "--steps", "4", "--warmup-steps", "1"]
    result = json.loads(jaxgpt("pretrain", *common, *words, "--json").splitlines()[-1])
    estimate, peak = result["memory_estimate"], result["memory_peak"]
    return {"estimate": estimate, "peak": peak, "ratio": round(estimate / peak, 3)}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = corpus(folder)
        shapes: dict[str, Any] = {}
        for number, (shape, words) in enumerate(SHAPES.items()):
            shapes[shape] = measured(data, folder / f"run-{number}", words)
            print(f"{shape}: {shapes[shape]}", file=sys.stderr, flush=True)
    passed = all(1 / FACTOR <= found["ratio"] <= FACTOR for found in shapes.values())
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    device = jax.devices()[0].device_kind
    result = {"benchmark": "preflight accuracy", "device": device, "versions": versions, "factor": FACTOR}
    print(json.dumps({**result, "shapes": shapes, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
