"""Everything worth knowing on a GPU machine, in one call of under ten minutes.

Quick tests, equivalence, then decode and training benchmarks in bfloat16; each part
has a share of the time and its end is reported, whatever became of it. The last
thing printed is a Markdown table for docs/performance.md.

    python scripts/gpu_report.py [--minutes 9.5]
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time

import jax

PYTHON = sys.executable
_QUICKLY = ["-m", "not slow and not exhaustive"]
QUICK = [PYTHON, "-m", "pytest", "-q", "-x", *_QUICKLY, "tests/test_model.py", "tests/test_generate.py"]
EQUIVALENCE = [PYTHON, "-m", "oracle", "equivalence", "--out", "build/equivalence"]
DECODE = [PYTHON, "scripts/bench_decode.py", "--device", "gpu", "--dtype", "bfloat16"]
TRAIN = [PYTHON, "scripts/bench_train.py", "--device", "gpu", "--dtype", "bfloat16"]
PARTS: list[tuple[str, list[str], float]] = [
    ("GPT-2 124M decode, batch 1", [*DECODE, "--new", "256"], 0.12),
    ("Qwen2-0.5B shape decode, batch 1", [*DECODE, "--preset", "qwen2-0.5b", "--new", "256"], 0.15),
    ("GPT-2 124M decode, batch 32", [*DECODE, "--batch", "32", "--prompt", "200"], 0.12),
    ("GPT-2 124M training, T=1024", [*TRAIN, "--batch", "32", "--time", "1024", "--rounds", "10"], 0.15),
    ("equivalence", EQUIVALENCE, 0.26),
    ("model and generation tests", QUICK, 0.2),
]
"""Name, command, share of the time it may take."""


def part(command: list[str], seconds: float) -> tuple[int, str, float]:
    """(exit code, last line of output, seconds); 124 where the time ran out."""
    started = time.monotonic()
    # The benchmarks and tests must see the GPU; torch in the same process may not take it all.
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
        code, text = done.returncode, done.stdout.strip() or done.stderr.strip()
        if code:
            print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
    except subprocess.TimeoutExpired:
        code, text = 124, f"more than {seconds:.0f} s"
    return code, (text.splitlines() or [""])[-1], time.monotonic() - started


def row(name: str, code: int, last: str, seconds: float) -> str:
    try:
        figures = json.loads(last)
        shown = ", ".join(f"{key} {value}" for key, value in figures.items() if isinstance(value, float | bool))
    except ValueError:
        shown = last[:120]
    return f"| {name} | {'ok' if code == 0 else f'exit {code}'} | {shown} | {seconds:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5)
    minutes = parser.parse_args().minutes
    rows: list[str] = []
    for name, command, share in PARTS:
        rows.append(row(name, *part(command, 60 * minutes * share)))
        print(rows[-1], file=sys.stderr, flush=True)
    device = jax.devices()[0].device_kind
    print(f"\n{device}, JAX {jax.__version__}, Python {sys.version.split()[0]}, {datetime.date.today()}\n")
    print("| what | end | figures | took |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
