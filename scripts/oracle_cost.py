"""What a comparison costs: seconds and memory of `oracle compare --all`, on a tiny GPT-2 and on GPT-2 124M.

Weights are random; each comparison is a process of its own. The first compiles everything, the second finds
the programs that the first kept.

    python scripts/oracle_cost.py
"""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oracle import models, subject

CONFIGS = {"tiny": models.MODELS["gpt2"], "124M": models.MODELS["gpt2"] | {"vocab_size": 50257, "n_embd": 768}}
CONFIGS["124M"] |= {"n_inner": 3072, "n_layer": 12, "n_head": 12, "n_positions": 1024}


def measured(config: models.Config, place: Path) -> tuple[float, float, float]:
    """Seconds of a first and of a second comparison, and GiB at the peak of all so far."""
    folder, checkpoint = place / "hf", place / "jaxgpt"
    models.write(config, folder, "float32")
    subject.import_folder(folder, checkpoint)
    command = [sys.executable, "-m", "oracle", "compare", str(checkpoint), "--reference", str(folder), "--all"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "programs")}

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - start

    return seconds(), seconds(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    """Print a table, the smaller model first."""
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print("| model | seconds | again | GiB |\n|---|---|---|---|")
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as place:
            first, again, memory = measured(config, Path(place))
        print(f"| GPT-2 {name} | {first:.0f} | {again:.0f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
