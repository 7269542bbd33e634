"""Repairs of parameters that cannot be right, where no file says what they should be."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.rungs import bits, statistics
from oracle.rungs.statistics import StatisticsSite
from oracle.site import Site


def reread(site: Site) -> Iterator[Variant]:
    """The bits of float16 and bfloat16 values taken for those of the other."""
    assert isinstance(site, StatisticsSite)
    array = np.asarray(site.candidate.stored[site.name]).astype(np.float32)
    for read, stored in (
        (np.dtype(np.float16), jnp.dtype(jnp.bfloat16)),
        (jnp.dtype(jnp.bfloat16), np.dtype(np.float16)),
    ):
        with np.errstate(over="ignore"):
            narrow = array.astype(read)
        if np.array_equal(narrow.astype(np.float32), array):
            values = narrow.view(stored).astype(np.float32)
            changed = bits.with_parameters(site.candidate, {site.name: values})
            yield Variant(f"with the bits read as {stored.name}", changed)


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "bits read in the wrong dtype",
        "take each tensor's dtype from its file's header (jaxgpt/formats/safetensors_file.py), and import anew",
        (statistics.NAME,),
        reread,
    ),
)
"""Only where the values themselves can tell: with a reference folder the rung bits names them first."""
