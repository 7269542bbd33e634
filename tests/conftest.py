"""Shared by every test: run-time shape checks, adversarial tiny configs, random parameters."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

# A tenth of the time to import everything; on again once all is collected.
gc.disable()
# A shell that starts a job in the background has it ignore Ctrl-C, and nohup SIGHUP, which tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What one test process compiles, the others and the commands they start find: they inherit the folder.
# It is new, so that nothing of an earlier run is in it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxgpt-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Where each operation was called from is written into every program, a tenth of the time to build one.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# Most of the suite's time is XLA and LLVM optimising programs that run once. The demo, the
# benchmarks and `make equivalence` run what users run, fully optimised.
_QUICK = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):  # XLA aborts at a flag that it does not know, and has these for a while only
    _QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _QUICK)

from jaxtyping import install_import_hook

# The annotated shapes of the model are checked at every call in the tests.
SHAPED = ("ops", "model", "transformer", "cache", "sampling")
install_import_hook([f"jaxgpt.{name}" for name in SHAPED], "beartype.beartype")

import dataclasses
import functools
import itertools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

from jaxgpt import weights
from jaxgpt.config import LLAMA_STYLE, QWEN2_STYLE, ModelConfig, RopeScaling


def pytest_configure() -> None:
    """Tiny matrices: torch's threads would only wait for each other. Processes that tests start do without torch."""
    import torch

    torch.set_num_threads(1)


GPT2 = ModelConfig(
    vocab_size=131,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=9,
    max_position_embeddings=96,
)
LLAMA = ModelConfig(
    **LLAMA_STYLE,
    vocab_size=131,
    hidden_size=42,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
"""All dimensions distinct, 1 < K < N, H is not D / N."""

CONFIGS: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "gpt2-erf-untied": dataclasses.replace(GPT2, hidden_act="gelu", tie_word_embeddings=False),
    "llama": LLAMA,
    "llama-biased-tied": dataclasses.replace(
        LLAMA, qkv_bias=True, attention_output_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3-scaling": dataclasses.replace(
        LLAMA, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    ),
    "llama-linear-scaling": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "qwen2": dataclasses.replace(LLAMA, **QWEN2_STYLE, hidden_size=56, num_attention_heads=4),
    "qwen2-tied": dataclasses.replace(
        LLAMA,
        **QWEN2_STYLE,
        hidden_size=48,
        head_dim=8,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_theta=1e6,
    ),
    "llama-square": dataclasses.replace(LLAMA, hidden_size=84),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, hidden_size=44, head_dim=10, tie_word_embeddings=True),
    "mistral": dataclasses.replace(LLAMA, sliding_window=11),
    "qwen3-yarn": dataclasses.replace(
        LLAMA,
        qk_norm=True,
        rope_theta=500.0,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=24),
    ),
}
"""Tiny and adversarial: a transposed, swapped or forgotten tensor cannot hide."""


_new_context = mlir.make_ir_context
_programs_built = itertools.count()


@functools.lru_cache(1)
def _context_of(hundred: int) -> Any:
    return _new_context()


# To make an MLIR context for each program takes as long as to build a small one; what is built in it is the same.
mlir.make_ir_context = lambda: _context_of(next(_programs_built) // 100)

_tests_run = itertools.count(1)
_MOST_AREAS = 20_000
"""A third of the memory areas that Linux lets a process have (vm.max_map_count)."""


def pytest_collection_finish() -> None:
    """Tracing makes many small objects; to look through a million that stay each time took a twentieth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    gc.enable()


@pytest.fixture(autouse=True)
def _programs_of_earlier_tests_give_way() -> Generator[None]:
    """A compiled program takes several memory areas; thousands of tests in one process would use them up and crash."""
    yield
    areas = Path("/proc/self/maps")
    if next(_tests_run) % 20 == 0 and areas.exists() and areas.read_bytes().count(b"\n") > _MOST_AREAS:
        jax.clear_caches()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters of realistic scale in which nothing is zero, one or symmetric."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            return 1.0 + 0.3 * noise
        if name.endswith("bias"):
            return 0.2 * noise
        return noise * (0.3 if "embed" in name else shape[0] ** -0.5 if "kernel" in name else shape[1] ** -0.5)

    return {p.name: jax.numpy.asarray(draw(p.name, p.shape)) for p in weights.parameters(config)}


def random_ids(config: ModelConfig, batch: int, time: int, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), dtype=np.int32)
    return jax.numpy.asarray(ids)


def rounding(values: np.ndarray | jax.Array) -> float:
    """What float32 rounding can move values of this size by: 32 units in the last place of the largest."""
    return 32 * float(np.finfo(np.float32).eps) * float(np.abs(np.asarray(values)).max())
