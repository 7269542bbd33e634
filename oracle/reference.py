"""The independent PyTorch model, twice: in float64 (truth) and in the candidate's dtype (peer).

Both hold the folder's weights rounded to the candidate's dtype, because that is
what it computes with: the rounding itself is no error of either. Whether the
candidate's weights are the right ones is the business of the rung bits.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchref
from jaxgpt.errors import InputError
from jaxgpt.taps import Op
from oracle import streaming
from oracle.echo import ECHOES, Changing, Forgetful, OnTap, echo, silent
from oracle.probe import Probe
from torchref import Cache, Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values; bfloat16, which numpy lacks, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclass(frozen=True)
class Model:
    """One torchref model, with numpy at its borders."""

    decoder: Decoder

    def stream(self, probe: Probe, on_tap: OnTap = silent) -> streaming.Taps:
        """The taps of one free-running forward, as they are computed."""
        inputs = {"positions": _ints(probe.positions), "segments": _ints(probe.segments)}
        return streaming.stream(lambda taps: self._forward(_ints(probe.ids), taps=taps, **inputs), on_tap)

    def run_op(self, op: Op, inputs: Sequence[np.ndarray | None]) -> np.ndarray:
        """One op on given inputs, computed in this model's dtype."""
        with torch.no_grad():
            return to_numpy(self.decoder.run_op(op.tap, [self._tensor(array) for array in inputs]))

    def _tensor(self, array: np.ndarray | None) -> torch.Tensor | None:
        if array is None:
            return None
        if array.dtype.kind in "biu":
            return torch.from_numpy(np.array(array)).to(torch.bool if array.dtype == np.bool_ else torch.long)
        # Truth computes everything in float64; the peer keeps each input in the dtype it comes in.
        narrow = torch.bfloat16 if array.dtype.name == "bfloat16" else torch.float32
        wanted = torch.float64 if self.decoder.dtype == torch.float64 else narrow
        return torch.from_numpy(array.astype(np.float32)).to(wanted)

    def logits(self, ids: np.ndarray, on_tap: OnTap = silent) -> np.ndarray:
        """(B, T, V) of whole sequences."""
        return to_numpy(self._forward(_ints(ids), taps=Forgetful(on_tap)))

    def advance(
        self, ids: np.ndarray, positions: np.ndarray, real: np.ndarray, past: Cache | None, on_tap: OnTap = silent
    ) -> tuple[dict[str, torch.Tensor], Cache]:
        """All taps of one cached forward, and the cache after it; `real` is false for padding."""
        past = self.decoder.empty_cache(len(ids)) if past is None else past
        taps = Changing(on_tap)
        self._forward(
            _ints(ids), positions=_ints(positions), attention_mask=torch.from_numpy(real), past=past, taps=taps
        )
        return taps, past

    def _forward(self, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        # Gradient mode belongs to a thread: a streamed forward has its own.
        with torch.no_grad():
            return self.decoder(ids, **given)


def _ints(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.int64))


def _in_float64(decoder: Decoder) -> Decoder:
    """A copy with the same weights in float64, made without a second one in the old dtype."""
    # What `deepcopy` finds in its memo it takes for copied already; tied parameters stay tied.
    wide = {id(parameter): torch.nn.Parameter(parameter.detach().double()) for parameter in decoder.parameters()}
    return copy.deepcopy(decoder, {**wide})


@dataclass(frozen=True)
class Reference:
    """Truth and peer of one folder."""

    truth: Model
    peer: Model

    @classmethod
    def load(cls, folder: Path, dtype: str) -> "Reference":
        """Both models of a Hugging Face folder.

        Raises:
            InputError: a folder that the reference cannot represent.
        """
        try:
            peer = torchref.load(folder, DTYPES[dtype])
        except torchref.LoadError as error:
            raise InputError(f"the reference cannot load {folder}: {error}") from error
        return cls(Model(_in_float64(peer)), Model(peer))

    def draws(self, probe: Probe, numbers: Iterable[int] = range(ECHOES)) -> list[streaming.Taps]:
        """Streams of the peer and of its echoes: draws of what rounding costs."""
        return [self.peer.stream(probe), *(self.peer.stream(probe, echo(number)) for number in numbers)]

    def logit_draws(self, ids: np.ndarray, numbers: Iterable[int] = range(ECHOES)) -> list[np.ndarray]:
        """(B, T, V) logits of the peer and of its echoes."""
        return [self.peer.logits(ids), *(self.peer.logits(ids, echo(number)) for number in numbers)]

    @property
    def in_training_mode(self) -> bool:
        """Dropout would be on."""
        return self.truth.decoder.training or self.peer.decoder.training
