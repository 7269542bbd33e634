"""Repairs of stored parameters, measured against the file's tensors bit for bit."""

from collections.abc import Iterator

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.rungs import bits
from oracle.rungs.bits import ParameterSite
from oracle.site import Site


def transposed(site: Site) -> Iterator[Variant]:
    """The matrix the other way round."""
    assert isinstance(site, ParameterSite)
    array = site.candidate.stored.get(site.name)
    if array is not None and np.ndim(array) == 2:
        yield Variant(
            "with the matrix transposed", bits.with_parameters(site.candidate, {site.name: np.asarray(array).T})
        )


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "kernel transposed",
        "transpose it where it is loaded: Conv1D stores (in, out), Linear (out, in); layouts are in jaxgpt/weights.py",
        (bits.NAME,),
        transposed,
    ),
)
"""Narrow ones first."""
