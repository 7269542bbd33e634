"""What is compared with what: everything a rung, a diagnosis or a repair may look at."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt.golden_prompts import Golden
from oracle import probe
from oracle.candidate import Candidate
from oracle.compare import Judge
from oracle.noise import Calibration
from oracle.reference import Reference


@dataclass(frozen=True)
class Comparison:
    """Everything a rung may look at."""

    candidate: Candidate
    reference: Reference
    export: Path | None
    """The candidate as the product's exporter writes it; None for one that was changed since."""
    source: Path | None
    """The Hugging Face folder the weights came from, if it is known."""
    calibration: Calibration
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    """Ids that end a text in a checkpoint without a tokenizer; None where the candidate's text side has them."""
    golden: Golden | None = None
    """What the checkpoint says that it answered where it was made; None without, or once the candidate was changed."""
    measured: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the rung operators measured of this reference on these inputs: see its `Measured`."""

    @property
    def real_ids(self) -> int:
        """Ids that mean something."""
        return self.candidate.real_ids or self.candidate.config.vocab_size

    def judge(self, rung: str) -> Judge:
        """Limits of one rung."""
        return Judge(rung, self.candidate.dtype, self.calibration)

    def sequences(self) -> probe.Probe:
        """Whole sequences to run both models on."""
        return probe.sequences(self.candidate.config, self.real_ids, self.seed)

    def decoding(self) -> probe.DecodeProbe:
        """Prompts and forced ids."""
        return probe.decoding(self.candidate.config, self.real_ids, self.seed + 1)
