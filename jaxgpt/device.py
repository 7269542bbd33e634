"""The device asked for is the device used."""

import os
from pathlib import Path

import jax

from jaxgpt.errors import InputError

_CACHE = "JAX_COMPILATION_CACHE_DIR"


def use(device: str) -> str:
    """Choose "cpu", "gpu" or "auto" for the whole process; returns the platform in use.

    Compiled programs are kept in `~/.cache/jaxgpt` (or $JAX_COMPILATION_CACHE_DIR),
    so that a second start need not compile again.

    Raises:
        InputError: a GPU was asked for and JAX sees none; never a silent fallback.
    """
    if _CACHE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxgpt"))
    if device not in ("auto", "cpu", "gpu"):
        raise InputError(f"device must be auto, cpu or gpu; got {device!r}")
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        # JAX_PLATFORMS names a device that does not work here.
        raise InputError(f"JAX cannot start: {' '.join(str(error).split())}; unset JAX_PLATFORMS") from None
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
