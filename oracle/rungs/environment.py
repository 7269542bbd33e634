"""Rung environment: can a comparison here mean anything?

Noise that was calibrated with these versions on this backend, full-precision matrix
products on both sides, no dropout, and each side repeats itself bit for bit;
otherwise every further answer would be inconclusive. A candidate that does not run at
all is left to the rungs behind, which say what does not fit.
"""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from oracle import noise
from oracle.candidate import Candidate, Unrunnable
from oracle.noise import Calibration
from oracle.probe import Probe
from oracle.reference import Reference
from oracle.results import RungResult

NAME = "environment"


def run(candidate: Candidate, reference: Reference, probe: Probe, calibration: Calibration) -> RungResult:
    """No findings: the rung passes or is inconclusive."""
    stale = noise.staleness(calibration.environment, versions())
    problems = [stale] if stale else [*precision_problems(), *_reference_problems(reference, probe)]
    repeats = "both sides repeat bit for bit"
    if not stale:
        try:
            problems += _candidate_problems(candidate, probe)
        except Unrunnable as reason:
            repeats = f"the reference repeats bit for bit, the candidate does not run ({reason})"
    summary = f"noise calibrated here, matrix products at full precision, dropout off, {repeats}"
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


def _reference_problems(reference: Reference, probe: Probe) -> list[str]:
    problems = ["the reference is in training mode: dropout is on"] if reference.in_training_mode else []
    if not _repeats(lambda: reference.peer.logits(probe.ids)):
        problems.append("the reference does not repeat itself bit for bit")
    return problems


def _candidate_problems(candidate: Candidate, probe: Probe) -> list[str]:
    def logits() -> np.ndarray:
        return np.asarray(candidate.forward(probe.ids, probe.positions, probe.segments)["logits"])

    return [] if _repeats(logits) else ["the candidate does not repeat itself bit for bit"]


def _repeats(logits: Callable[[], np.ndarray]) -> bool:
    return np.array_equal(logits(), logits(), equal_nan=True)


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
