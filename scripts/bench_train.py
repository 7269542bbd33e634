"""A training step's speed: tokens/s, and the share of XLA's own rate on the same matrix products.

The peak is measured, not looked up: the model's matmul shapes, forward and both
backward products, alternating with the training step in one run. On a GPU the MFU
against the vendor's bf16 peak is printed as well. Prints one JSON line last.

    python scripts/bench_train.py                                   # CPU, float32
    python scripts/bench_train.py --device gpu --dtype bfloat16 --batch 32 --time 1024
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

from jaxgpt import device, flops, gates, transformer
from jaxgpt.config import ModelConfig
from jaxgpt.presets import PRESETS
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import initial_state, stacked, train_step


def matmul_shapes(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(in, out, count) of the model's projections."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layers = c.num_hidden_layers
    mlp = [(c.hidden_size, c.intermediate_size, layers * (2 if c.gated_mlp else 1))]
    mlp.append((c.intermediate_size, c.hidden_size, layers))
    attention = [(c.hidden_size, q, layers), (c.hidden_size, kv, 2 * layers), (q, c.hidden_size, layers)]
    return [*attention, *mlp, (c.hidden_size, c.vocab_size, 1)]


def matmul_rate(config: ModelConfig, tokens: int, dtype: str) -> Callable[[], float]:
    """A function that measures FLOP/s of forward, input-gradient and weight-gradient products."""

    @jax.jit
    def products(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        return x @ w, g @ w.T, x.T @ g

    operands: list[Any] = []
    for inputs, outputs, count in matmul_shapes(config):
        shapes = ((tokens, inputs), (inputs, outputs), (tokens, outputs))
        arrays = [jnp.full(shape, 0.5, jnp.dtype(dtype)) for shape in shapes]
        jax.block_until_ready(products(*arrays))
        operands.append((arrays, count, 6 * tokens * inputs * outputs))

    def measure() -> float:
        spent = work = 0.0
        for arrays, count, flop in operands:
            started = time.perf_counter()
            jax.block_until_ready(products(*arrays))
            spent += count * (time.perf_counter() - started)
            work += count * flop
        return work / spent

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device.use(args.device)
    config = PRESETS[args.preset]
    settings = TrainSettings(batch_size=args.batch, sequence_length=args.time)
    state = initial_state(transformer.init(config, 0), settings)
    batch = stacked([gates.random_batch(config, args.batch, args.time)])
    tokens = args.batch * args.time
    rate_of_matmuls = matmul_rate(config, tokens, args.dtype)
    state, report = train_step(config, settings, args.dtype, state, batch)
    jax.block_until_ready(report)

    shares: list[float] = []
    rates: list[float] = []
    for number in range(args.rounds):
        before = rate_of_matmuls()
        started = time.perf_counter()
        state, report = train_step(config, settings, args.dtype, state, batch)
        jax.block_until_ready(report)
        spent = time.perf_counter() - started
        achieved = flops.flops_per_token(config, args.time) * tokens / spent
        reference = (before + rate_of_matmuls()) / 2
        shares.append(achieved / reference)
        rates.append(tokens / spent)
        print(
            f"round {number + 1}: {rates[-1]:,.0f} tokens/s, {achieved / 1e9:,.1f} of {reference / 1e9:,.1f} GFLOP/s",
            file=sys.stderr,
        )
    peak = flops.peak(device.describe())
    rate = statistics.median(rates)
    result = {
        "benchmark": "train",
        "preset": args.preset,
        "dtype": args.dtype,
        "device": device.describe(),
        "batch": args.batch,
        "time": args.time,
        "tokens_per_second": round(rate, 1),
        "share_of_matmul_rate": round(statistics.median(shares), 3),
        "mfu": round(rate * flops.flops_per_token(config, args.time) / peak, 4) if peak else None,
        "formula": "6·(parameters in matrix products) + 12·L·N·H·T per token",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
