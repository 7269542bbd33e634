"""From folders to a comparison: the checkpoint through the product's loader, the export through its exporter."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from jaxgpt import checkpoint, golden_prompts
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.errors import InputError
from jaxgpt.formats import hf, importing
from oracle import diagnosis, ladder, lesson, memory, preconditions, training_probe
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.reference import Reference
from oracle.results import Report
from oracle.rungs import bits, decode
from oracle.text import Text


def candidate(directory: Path, dtype: str) -> Candidate:
    """The checkpoint's model in a compute dtype.

    Raises:
        InputError: no checkpoint there, or one that fails a check.
    """
    return _candidate(checkpoint.load(directory), dtype)


def _candidate(loaded: Checkpoint, dtype: str) -> Candidate:
    real_ids = loaded.tokenizer.vocab_size if loaded.tokenizer else None
    # On the device once, so that the compute dtype's copy is none where it is the stored one.
    stored = {name: jnp.asarray(array) for name, array in loaded.params.items()}
    return Candidate(loaded.config, stored, dtype, real_ids=real_ids, text=Text.of(loaded))


def compare(
    directory: Path,
    source: Path | None,
    dtype: str,
    calibration: Calibration,
    *,
    everything: bool = False,
    seed: int = 0,
    diagnose: bool = False,
    plant: Callable[[Candidate], Candidate] = lambda true: true,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare a checkpoint with the folder its weights came from or, without one, with its own export.

    Args:
        directory: a run folder, or one step's.
        source: the Hugging Face folder that is the reference; None to use the export.
        dtype: compute dtype of candidate and peer.
        calibration: the limits.
        everything: go on after a rung that failed.
        seed: of the probe inputs.
        diagnose: look for the causes of what differs.
        plant: changes the candidate, but not its export, to plant a fault.
        progress: told the name of each rung before it runs, and "" at the end.

    Raises:
        InputError: a checkpoint or a folder that cannot be used or fits no common model, too little memory or
            disk, or a config without a Hugging Face type.
    """

    def begins(name: str) -> None:
        if not name.endswith(bits.NAME):
            bits.forget()
        if name == decode.NAME and training_probe.is_large(chosen.config):
            lesson.forget()
        memory.release()
        progress(name)

    preconditions.check(directory, source, dtype)
    with preconditions.temporary_folder() as place:
        export = Path(place, "export")
        progress("export")
        loaded, chosen = _exported(directory, export, dtype, plant)
        stops = None if loaded.tokenizer else tuple(loaded.eos_token_ids)
        golden = golden_prompts.read(loaded.path)
        del loaded  # its arrays are the candidate's
        reference = Reference.load(source or export, dtype)
        if source is not None:
            preconditions.refuse_not_finite(reference, source)
        comparison = Comparison(chosen, reference, export, source, calibration, seed, stops, golden)
        climb = diagnosis.bisect if diagnose else ladder.climb
        try:
            report = climb(comparison, everything=everything, progress=begins)
        finally:
            if training_probe.is_large(chosen.config):
                lesson.forget()
    progress("")
    return report


def _exported(
    directory: Path, export: Path, dtype: str, plant: Callable[[Candidate], Candidate]
) -> tuple[Checkpoint, Candidate]:
    loaded = checkpoint.load(directory)
    chosen = plant(_candidate(loaded, dtype))  # first: it may refuse the model
    preconditions.require_space(export.parent, loaded)
    try:
        hf.write(loaded, export)
    except InputError as error:
        if " was not written: " in str(error):
            raise InputError(f"{error}; {preconditions.MAKE_ROOM}") from error
        raise
    return loaded, chosen


def import_folder(source: Path, directory: Path) -> None:
    """A Hugging Face folder as a checkpoint, through the product's importer."""
    importing.import_model(source, directory, golden=False)
