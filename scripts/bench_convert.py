"""Import and export against copying the weights' bytes and hashing them once, alternating in one run.

A random bfloat16 model; the median ratio of paired runs is the figure to quote,
because a shared machine's speed drifts. Imports and exports move files: the golden prompts
are asked once, as at the end of a run, and how long that takes is printed by itself, for a
CPU computes bfloat16 slowly. Peak memory is that of an export to GGUF in a
process of its own. Prints one JSON line last.

    python scripts/bench_convert.py                         # 124 M parameters
    python scripts/bench_convert.py --preset qwen2-0.5b     # 494 M parameters, 4 GB of disk
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxgpt import golden_prompts, weights
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.formats import gguf_export, hf, importing
from jaxgpt.presets import PRESETS

PEAK = """
import sys
from pathlib import Path
from jaxgpt.formats import gguf_export
gguf_export.export_gguf(sys.argv[1], sys.argv[2])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def a_folder(preset: str, out: Path) -> int:
    """A Hugging Face folder of random weights; bytes of its weights."""
    config = PRESETS[preset]
    rng = np.random.default_rng(0)
    params = {
        p.name: (0.02 * rng.standard_normal(p.shape, np.float32)).astype(ml_dtypes.bfloat16)
        for p in weights.parameters(config)
    }
    source = Checkpoint(
        path=out, step=0, config=config, stage="base", compute_dtype="bfloat16", eos_token_ids=[], tokenizer=None,
        template=None, provenance={}, params=params,
    )  # fmt: skip
    hf.write(source, out)
    return (out / hf.WEIGHTS).stat().st_size


def copy_and_hash(source: Path, out: Path) -> None:
    out.mkdir()
    shutil.copyfile(source / hf.WEIGHTS, out / hf.WEIGHTS)
    with (out / hf.WEIGHTS).open("rb") as file:
        os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256")


def timed(work: Callable[[Path], object], out: Path) -> float:
    begin = time.perf_counter()
    work(out)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return seconds


def peak_bytes(checkpoint: Path, out: Path) -> int | None:
    if sys.platform != "linux":
        return None
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint), str(out)], capture_output=True, text=True, check=True
    )
    out.unlink()
    return int(run.stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as name:
        folder, source, made = Path(name), Path(name) / "hf", Path(name) / "checkpoint"
        size = a_folder(arguments.preset, source)
        importing.import_model(source, made, golden=False)
        begin = time.perf_counter()
        golden_prompts.add(made)
        asking = time.perf_counter() - begin
        print(f"asking the golden prompts {asking:.2f} s")
        works: dict[str, Callable[[Path], object]] = {
            "copy_and_hash": lambda out: copy_and_hash(source, out),
            "import": lambda out: importing.import_model(source, out, golden=False),
            "export_hf": lambda out: hf.export_hf(made, out),
            "export_gguf": lambda out: gguf_export.export_gguf(made, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for number in range(arguments.rounds):
            for name, work in works.items():
                seconds[name].append(timed(work, folder / "out"))
            print(f"round {number + 1}: {', '.join(f'{n} {s[-1]:.2f} s' for n, s in seconds.items())}")
        peak = peak_bytes(made, folder / "out")
    base = seconds["copy_and_hash"]
    ratios = {name: statistics.median(a / b for a, b in zip(s, base, strict=True)) for name, s in seconds.items()}
    result = {
        "preset": arguments.preset,
        "bytes": size,
        "rounds": arguments.rounds,
        "copy_and_hash_s": statistics.median(base),
        "golden_prompts_s": asking,
        **{f"{name}_ratio": ratio for name, ratio in ratios.items() if name != "copy_and_hash"},
        "gguf_peak_bytes": peak,
        "gguf_peak_per_byte": peak and peak / size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
