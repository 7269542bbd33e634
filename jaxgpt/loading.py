"""From a checkpoint folder to a model that answers: what `jaxgpt.load` is."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

from jaxgpt import checkpoint

if TYPE_CHECKING:
    from jaxgpt.lm import LM


def load(directory: str, *, device: str = "auto", compute_dtype: str | None = None) -> "LM":
    """Load a checkpoint folder for inference; its weights, architecture and tokenizer are verified first.

    Args:
        directory: a run folder (its newest step is taken) or one step folder.
        device: "auto", "cpu" or "gpu"; a device that is asked for and missing is an error.
        compute_dtype: "float32", "bfloat16" or "float16" instead of the one recorded in the checkpoint.

    Raises:
        InputError: no checkpoint there, or one that fails a check; nothing loads silently wrong.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as verifier:
        # Files are hashed while JAX is imported. Nothing else: two threads that import JAX would meet halfway.
        verified = verifier.submit(checkpoint.verify, directory, stop=stop)
        try:
            from jaxgpt.device import use
            from jaxgpt.lm import LM

            use(device)
            return LM(checkpoint.read(verified.result()), compute_dtype=compute_dtype)
        finally:
            stop.set()  # or Ctrl-C, and a device that is not there, would wait for the whole checkpoint
