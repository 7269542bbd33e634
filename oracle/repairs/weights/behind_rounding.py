"""A tensor in the wrong place or order whose values were rounded as well: the order can still be undone.

Each repair of layouts and exchanges is tried again against the file's values as the
rounding leaves them, where ours are such values and the file's are not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights.encodings import ROUNDINGS, Encoding, made_by
from oracle.rungs import bits
from oracle.rungs.bits import ParameterSite, sampled
from oracle.site import Site


class Rounded(Mapping[str, np.ndarray]):
    """A file's tensors after a rounding, computed when they are asked for."""

    def __init__(self, file: Mapping[str, np.ndarray], rounding: Encoding):
        self.file, self.rounding = file, rounding
        self.known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.known:
            self.known[name] = self.rounding.wrong(self.file[name])
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


def rounded_sites(site: ParameterSite) -> list[ParameterSite]:
    """The same place beside the file as each rounding that ours may have gone through leaves it."""
    ours, theirs = site.ours, site.theirs
    if ours is None or theirs is None or any(made_by(rounding, ours, theirs) for _, rounding in ROUNDINGS):
        return []
    kept = [rounding for _, rounding in ROUNDINGS if _survives(rounding, ours) and not _survives(rounding, theirs)]
    return [replace(site, file=Rounded(site.file, rounding)) for rounding in kept]


def _survives(rounding: Encoding, array: np.ndarray) -> bool:
    few = array[sampled(array)].astype(np.float32)
    with np.errstate(all="ignore"):
        return bool(np.array_equal(rounding.wrong(few).astype(np.float32), few))


def behind(repair: Repair) -> Repair:
    """The repair, which then takes the unrounded values of what it moves from the file."""

    def variants(site: Site) -> Iterator[Variant]:
        if not isinstance(site, ParameterSite):
            return
        for rounded in site.once(rounded_sites):
            for variant in repair.variants(rounded):
                before, after = site.candidate.stored, variant.candidate.stored
                values = {name: site.file[name] for name in after if after[name] is not before.get(name)}
                change = f"{variant.change}, and the file's values before they were rounded"
                yield replace(variant, change=change, candidate=bits.with_parameters(site.candidate, values))

    return replace(repair, rungs=(bits.NAME,), variants=variants, last_resort=True)
