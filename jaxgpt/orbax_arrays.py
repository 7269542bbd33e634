"""The arrays of a step as Orbax writes and reads them; it is known here and nowhere else.

It is imported where it is used: it is slow to load.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import processes
from jaxgpt.array_files import Header
from jaxgpt.errors import InputError
from jaxgpt.step_folder import Contents

_NEVER_BEGUN = (
    "async_serialize_from_host",
    "_background_serialize",
    "_create_paths",
    "_finalize_save",
    "_run_background",
    "_serialize_without_dispatcher",
    "_write_metadata_after_commits",
)
"""Coroutines that Orbax leaves behind."""


def begin(partial: Path, contents: Contents, copy: bool) -> Any:
    """Begin to write the arrays into the folder; the `result()` of what is returned waits for them."""
    ocp = _orbax()
    given = {"params": contents.params, "train": contents.train}
    # Orbax takes no numpy scalar, which numpy makes of every 0-dimensional result.
    trees = {
        tree: {name: np.asarray(array) if isinstance(array, np.generic) else array for name, array in arrays.items()}
        for tree, arrays in given.items()
        if arrays is not None
    }
    context = _storage()
    context.memory.deepcopy_host_arrays = copy
    # Else, where a save fails to begin, threads wait 300 s for folders that nobody makes, and the exit for them.
    context.asynchronous.create_directories_asynchronously = False
    with context:
        return ocp.save_checkpointables_async(partial, trees)


def read(path: Path, tree: str, headers: Mapping[str, Header]) -> dict[str, np.ndarray]:
    """Arrays of one tree, whole, as they were declared.

    Raises:
        InputError: Orbax cannot read them.
    """
    # Numpy targets: no device is touched, and 64-bit integers stay whole.
    target = {name: np.broadcast_to(np.zeros((), dtype_of(h.dtype)), h.shape) for name, h in headers.items()}
    try:
        with _storage(together=False):
            loaded = _orbax().load(path, target, checkpointable_name=tree)
    except Exception as error:
        # What its manifest vouches for and Orbax cannot read: made by another program, or with intent.
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{tree} cannot be read ({type(error).__name__}: {reason}); restore it") from error
    return dict(loaded)


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, with bfloat16."""
    import jax.numpy as jnp

    return jnp.dtype(name)


def _orbax() -> Any:
    # Orbax reports on its own thread what `Saving.result` raises, and warns of storage chosen on purpose.
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    logging.getLogger("asyncio").addFilter(_is_news)
    # Of what a save that failed had still to do, Python warns when it forgets it.
    warnings.filterwarnings(
        "ignore", f"coroutine '.*\\b({'|'.join(_NEVER_BEGUN)})\\b.*' was never awaited", RuntimeWarning
    )
    _hush_tensorstore()
    try:
        from orbax.checkpoint import v1 as ocp
    except ImportError:
        from orbax.checkpoint.experimental import v1 as ocp
    return ocp


def _is_news(record: logging.LogRecord) -> bool:
    """False for the other arrays of a save that failed, which is raised once."""
    message = record.getMessage()
    return "exception was never retrieved" not in message or "orbax" not in message


@functools.cache
def _hush_tensorstore() -> None:
    """After an array that failed, its thread calls Orbax's closed event loop; the failure itself is raised."""
    others = sys.unraisablehook

    def hook(told: Any) -> None:
        if told.object is not None or str(told.exc_value) != "Event loop is closed":
            others(told)

    sys.unraisablehook = hook


def _storage(*, together: bool = True) -> Any:
    """One folder an array, uncompressed: what `array_files` can check.

    Several processes write their parts of it together; each reads for itself.
    """
    context = _orbax().Context()
    if not together and processes.count() > 1:
        own = processes.number()
        context.multiprocessing.primary_host = own
        context.multiprocessing.active_processes = {own}
        context.multiprocessing.barrier_sync_key_prefix = f"process-{own}"
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_zarr3 = True
    saving.use_compression = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    return context
