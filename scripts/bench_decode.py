"""Greedy decoding against transformers' `generate`, alternating in one run.

The same random weights on both sides; the median ratio of paired runs is the
figure to quote, because a shared machine's speed drifts. Prints one JSON line last.

    python scripts/bench_decode.py                       # CPU, float32
    python scripts/bench_decode.py --device gpu --dtype bfloat16 --preset qwen2-0.5b
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import device, generate, model, transformer, weights
from jaxgpt.config import ModelConfig, to_hf
from jaxgpt.presets import PRESETS
from jaxgpt.settings import GenerationSettings


def peer(config: ModelConfig, params: dict[str, jax.Array], dtype: str, on: str) -> Any:
    """Stock transformers with the same weights."""
    import torch
    import transformers

    keys = to_hf(config, dtype)
    model_type = keys.pop("model_type")
    hf = transformers.AutoConfig.for_model(model_type, **keys)
    hf.bos_token_id = hf.eos_token_id = None
    made = transformers.AutoModelForCausalLM.from_config(hf)
    float32 = {name: np.asarray(array, np.float32) for name, array in weights.to_hf(config, params).items()}
    made.load_state_dict({name: torch.tensor(array) for name, array in float32.items()}, strict=False)
    return made.to(getattr(torch, dtype)).to("cuda" if on == "gpu" else "cpu").eval()


def theirs(made: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=made.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=made.device)
    with torch.inference_mode():
        out = made.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return out[:, longest:].tolist()


def ours(generator: generate.Generator, prompts: list[list[int]], new: int) -> list[list[int]]:
    rows = [generate.Row(prompt, new, 0) for prompt in prompts]
    out: list[list[int]] = [[] for _ in rows]
    for chunk in generator.stream(rows, GenerationSettings(max_new_tokens=new)):
        for row, ids in zip(out, chunk, strict=True):
            row.extend(ids)
    return out


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--batch", type=int, default=1, help="rows; more than one are of different lengths")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    platform = device.use(args.device)
    config = PRESETS[args.preset]
    params = model.cast(transformer.init(config, 0), args.dtype)
    generator = generate.Generator(config, params, real_ids=config.vocab_size, stop_ids=[], dtype=jnp.dtype(args.dtype))
    made = peer(config, params, args.dtype, platform)
    rng = np.random.default_rng(0)
    lengths = [max(1, args.prompt - 5 * row) for row in range(args.batch)]
    prompts: list[list[int]] = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]

    same = ours(generator, prompts, args.new) == theirs(made, prompts, args.new)  # warms both up
    pairs: list[tuple[float, float]] = []
    for number in range(args.rounds):
        pair = seconds(lambda: ours(generator, prompts, args.new)), seconds(lambda: theirs(made, prompts, args.new))
        pairs.append(pair)
        rates = [args.batch * args.new / s for s in pair]
        print(f"round {number + 1}: jaxgpt {rates[0]:.1f} tok/s, transformers {rates[1]:.1f} tok/s", file=sys.stderr)
    result = {
        "benchmark": "decode",
        "preset": args.preset,
        "dtype": args.dtype,
        "device": device.describe(),
        "batch": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        "jaxgpt_tokens_per_second": round(args.batch * args.new / statistics.median(p[0] for p in pairs), 2),
        "transformers_tokens_per_second": round(args.batch * args.new / statistics.median(p[1] for p in pairs), 2),
        "ratio": round(statistics.median(p[1] / p[0] for p in pairs), 3),
        "same_tokens": same,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
