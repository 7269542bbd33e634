"""Recording what the oracle itself knows: a checkpoint of jaxgpt, and the independent reference.

Both have the same taps under the same names, so that their traces need no map.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxgpt.config import ModelConfig, from_hf
from jaxgpt.errors import InputError
from oracle.traces.recorder import environment, record
from oracle.traces.trace import Trace

INPUTS = ("ids", "positions", "segments")
"""What both models are given, (B, T) each."""
BATCH, TIME = 2, 32
"""Of the ids that are drawn where none are given."""
DTYPES = ("float32", "bfloat16")
"""In which a checkpoint can compute."""


def given(ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Rows of ids of equal length, one document each, as a model's inputs.

    Raises:
        InputError: no rows, or of unequal length.
    """
    lengths = sorted({len(row) for row in ids})
    if len(lengths) != 1 or not lengths[0]:
        raise InputError(f"prompts to record must have one length, got {lengths}; give rows of as many ids each")
    array = np.array(ids, np.int32)
    positions = np.broadcast_to(np.arange(array.shape[1], dtype=np.int32), array.shape)
    return {"ids": array, "positions": positions, "segments": np.ones_like(array)}


def drawn(vocabulary: int, context: int) -> list[list[int]]:
    """Random ids, the same every time."""
    shape = (BATCH, min(TIME, context))
    return np.random.default_rng(0).integers(0, vocabulary, shape).tolist()


def _limits(config: ModelConfig) -> tuple[int, int]:
    return config.vocab_size, config.max_position_embeddings


def _check(inputs: dict[str, np.ndarray], vocabulary: int, context: int) -> dict[str, np.ndarray]:
    ids, time = inputs["ids"], inputs["ids"].shape[1]
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(f"token {ids.max() if ids.min() >= 0 else ids.min()} outside vocabulary 0–{vocabulary - 1}")
    if time > context:
        raise InputError(f"the ids to record are {time} tokens a row; the model's limit is {context}")
    return inputs


def record_checkpoint(directory: Path, inputs: dict[str, np.ndarray] | None, dtype: str) -> Trace:
    """All taps of one forward of a jaxgpt checkpoint.

    Args:
        directory: a run folder, or one step's.
        inputs: see `given`; None draws them.
        dtype: in which it computes.

    Raises:
        InputError: no checkpoint there, or ids it cannot read.
    """
    import jax.numpy as jnp

    from jaxgpt import checkpoint
    from oracle.candidate import Candidate

    loaded = checkpoint.load(directory)
    limits = _limits(loaded.config)
    inputs = _check(inputs or given(drawn(*limits)), *limits)
    candidate = Candidate(loaded.config, {name: jnp.asarray(array) for name, array in loaded.params.items()}, dtype)
    taps = candidate.forward(*(inputs[name] for name in INPUTS))
    arrays = {name: np.asarray(tap) for name, tap in taps.items()}
    return Trace(arrays, inputs, environment(recorder="jaxgpt", dtype=dtype))


def record_reference(folder: Path, inputs: dict[str, np.ndarray] | None, dtype: str) -> Trace:
    """All taps of one forward of torchref on a Hugging Face folder; in float64 it is a truth.

    Raises:
        InputError: a checkpoint, a folder that the reference cannot represent, or ids it cannot read.
    """
    import torch

    import torchref
    from oracle import preconditions

    compute = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float32}[dtype]
    try:
        decoder = torchref.load(folder, compute)
    except torchref.LoadError as error:
        if not (folder / "config.json").exists():
            preconditions.refuse_checkpoint(folder)
        raise InputError(f"the reference cannot load {folder}: {error}") from None
    decoder = decoder.double() if dtype == "float64" else decoder
    limits = _limits(from_hf(json.loads((folder / "config.json").read_text("utf-8"))))
    inputs = _check(inputs or given(drawn(*limits)), *limits)
    taps: dict[str, torch.Tensor] = {}

    def forward() -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(inputs[name].astype(np.int64)) for name in INPUTS}
        with torch.no_grad():
            decoder(tensors.pop("ids"), taps=taps, **tensors)
        return taps

    recorded = record(forward)
    return Trace(recorded.taps, inputs, environment(recorder="torchref", dtype=dtype))
