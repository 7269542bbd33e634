"""Rung environment: can a comparison here mean anything?

Noise that was calibrated with these versions on this backend, full-precision matrix
products on both sides, no dropout, and each side repeats itself bit for bit;
otherwise every further answer would be inconclusive.
"""

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np
import torch

from oracle import noise
from oracle.candidate import Candidate
from oracle.noise import Calibration
from oracle.probe import Probe
from oracle.reference import Reference
from oracle.results import RungResult

NAME = "environment"


def run(candidate: Candidate, reference: Reference, probe: Probe, calibration: Calibration) -> RungResult:
    """No findings: the rung passes or is inconclusive."""
    stale = noise.staleness(calibration.environment, versions())
    problems = [stale] if stale else [*precision_problems(), *_repetition_problems(candidate, reference, probe)]
    summary = "noise calibrated here, matrix products at full precision, dropout off, both sides repeat bit for bit"
    return RungResult(NAME, [], problems[0] if problems else summary, inconclusive="; ".join(problems))


def precision_problems() -> list[str]:
    """Settings under which a matrix product is not computed in its operands' dtype."""
    problems: list[str] = []
    # jax.config declares its options at run time.
    precision: str | None = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    if precision != "highest":
        problems.append(f"JAX's matmul precision is {precision}, not highest")
    if torch.get_float32_matmul_precision() != "highest":
        problems.append(f"torch's matmul precision is {torch.get_float32_matmul_precision()}, not highest")
    if torch.backends.cuda.matmul.allow_tf32:
        problems.append("torch may use TF32")
    return problems


def _repetition_problems(candidate: Candidate, reference: Reference, probe: Probe) -> list[str]:
    def ours() -> np.ndarray:
        return np.asarray(candidate.forward(probe.ids, probe.positions, probe.segments)["logits"])

    def theirs() -> np.ndarray:
        return reference.peer.logits(probe.ids)

    problems: list[str] = []
    if reference.in_training_mode:
        problems.append("the reference is in training mode: dropout is on")
    if not np.array_equal(ours(), ours(), equal_nan=True):
        problems.append("the candidate does not repeat itself bit for bit")
    if not np.array_equal(theirs(), theirs(), equal_nan=True):
        problems.append("the reference does not repeat itself bit for bit")
    return problems


def versions() -> dict[str, Any]:
    """What ran: for the report and beside the calibration."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
