"""The device asked for is the device used."""

import os
import warnings
from pathlib import Path

import jax

from jaxgpt.errors import InputError

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_programs() -> None:
    """Compiled programs stay in `~/.cache/jaxgpt` (or $JAX_COMPILATION_CACHE_DIR): a second start need not compile."""
    if _CACHE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxgpt"))
        # Nobody asked for that folder: where it cannot be used, starts are slower, and nothing is wrong.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)
    if _LEAST not in os.environ:
        # JAX keeps those that took a second; a small model has many that take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def use(device: str) -> str:
    """Choose "cpu", "gpu" or "auto" for the whole process, and keep its programs; returns the platform in use.

    Raises:
        InputError: a GPU was asked for and JAX sees none; never a silent fallback.
    """
    keep_programs()
    if device not in ("auto", "cpu", "gpu"):
        raise InputError(f"device must be auto, cpu or gpu; got {device!r}")
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        # JAX_PLATFORMS names a device that does not work here, or JAX_NUM_CPU_DEVICES is no number of them.
        variables = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_"))) or "JAX_PLATFORMS"
        raise InputError(f"JAX cannot start: {' '.join(str(error).split())}; correct or unset {variables}") from None
    if device == "gpu" and platform != "gpu":
        raise InputError("--device gpu requested, JAX sees only CPU; install jaxgpt[cuda12]")
    if device == "cpu" and platform != "cpu":
        raise InputError(f"--device cpu requested after JAX started on {platform}; set JAX_PLATFORMS=cpu")
    return platform


def describe() -> str:
    """The device in words, e.g. `cpu` or `NVIDIA H200`."""
    return jax.devices()[0].device_kind


def overlooked_gpu() -> bool:
    """True when this machine has an NVIDIA GPU that JAX does not use."""
    return jax.default_backend() == "cpu" and Path("/dev/nvidia0").exists()
