"""What the device does at best, measured: bytes a second of a copy, FLOPs a second of a matrix product.

Yardsticks for a benchmark of the same run: on a shared machine only a ratio of two
things measured together means something.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 5
COPIED = {"cpu": 1 << 27, "gpu": 1 << 30}
"""Bytes of the array copied, several times any cache."""
SIDE = {"cpu": 1024, "gpu": 8192}
"""Rows and columns of the matrices multiplied."""


def copy_rate() -> float:
    """Bytes a second read and written by an elementwise operation on a large float32 array."""
    size = COPIED.get(jax.default_backend(), COPIED["cpu"])
    array = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / _seconds(jax.jit(lambda x: x + 1), array)


def matmul_rate(dtype: Any) -> float:
    """FLOPs a second of a product of two square matrices of `dtype`."""
    side = SIDE.get(jax.default_backend(), SIDE["cpu"])
    array = jnp.full((side, side), 0.5, dtype)
    return 2 * side**3 / _seconds(jax.jit(lambda x: x @ x), array)


def _seconds(program: Callable[[Any], Any], array: Any) -> float:
    jax.block_until_ready(program(array))
    spent: list[float] = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(program(array))
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)
