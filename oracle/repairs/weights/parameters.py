"""Repairs of wrong weights, and which of them may speak where several could.

First come those that undo the cause in our own values, or exchange our own tensors;
what they bring back is the file bit for bit, so they need no order but "narrow ones
first". Where the right values are lost, the file's are loaded, and the look of the
difference names the cause. Only the first row that fits does, so that names exclude
each other; where none fits, the cause stays unknown.

| # | name | ours against the file's tensor |
| --- | --- | --- |
| 1 | bias dropped, parameter missing, rows truncated, padded vocabulary rows live | absent; the last rows alone |
| 2 | another parameter's tensor loaded, layers shifted by one | equal to another tensor of the file |
| 3 | values rounded …, and row by row `encodings.MISTAKES` | exactly what the mistake makes of the file's values |
| 3b | the names of `layouts` and `exchanges` | the file's values, rounded, in that order or place |
| 4 | NaN or infinite values | equal but where not finite |
| 5 | bias dropped, tensor of zeros, tensor left at its random init (norms) | constant 0 or 1 |
| 6 | norm weights folded into the next projection | 1, and its readers are norm times kernel |
| 7 | embedding rows shifted, read from a wrong offset | equal at one distance, the ends lost |
| 8 | a few elements corrupted | one in a thousand differs, or four |
| 9 | some elements zeroed | 0 wherever it differs |
| 10 | tensor scaled by a constant | one ratio, to the rounding |
| 11 | weight dequantised from int8 or int4 | on a grid made of the file's own extremes |
| 12 | values rounded to fewer bits | mantissas end in zeros, within half a step |
| 13 | a low-rank change, such as a merged adapter | dense, beyond the rounding, of rank ≤ 64 and a third of the width |
| 14 | weights of another revision | in at least four tensors: dense, full-rank, within 0.45 of the size |
| 14 | weights of one layer altered | the same, and all of them are one layer's |
| 15 | tensor left at its random init | uncorrelated, distributed as an initialiser's values |
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights import differences, encodings, exchanges, layouts, presence, resemblance
from oracle.repairs.weights.behind_rounding import behind, rounded_sites
from oracle.repairs.weights.differences import Look
from oracle.repairs.weights.parameter_repair import changed, repair
from oracle.rungs.bits import HEAD, ParameterSite, is_finite

_EXACT: tuple[Repair, ...] = (*presence.LOSSES, *exchanges.LOSSES, *encodings.LOSSES)
_BEHIND_ROUNDING = tuple(behind(repair) for repair in (*layouts.REPAIRS, *exchanges.REPAIRS))
_LOOKS: tuple[Callable[[ParameterSite, np.ndarray, np.ndarray], Look | None], ...] = (
    differences.not_finite,
    differences.constant,
    differences.shifted,
    differences.few_elements,
    differences.zeroed,
    differences.scaled,
    resemblance.dequantised,
    resemblance.fewer_bits,
    resemblance.low_rank,
    resemblance.revision,
    resemblance.random_init,
)


def look(site: ParameterSite) -> Look | None:
    """The first look of the table that fits a difference which nothing exact explains."""
    ours, theirs = site.ours, site.theirs
    if ours is None or theirs is None or ours.shape != theirs.shape or not ours.size:
        return None
    if site.finding.ok or any(next(repair.variants(site), None) for repair in (*_EXACT, *_BEHIND_ROUNDING)):
        return None
    for rounded in site.once(rounded_sites):
        found = differences.few_elements(rounded, ours, rounded.file[site.name])
        if found is not None:
            return found
    for fits in _LOOKS:
        found = fits(site, ours, theirs)
        if found is not None:
            return found
        if fits is differences.not_finite and not is_finite(ours).all():
            return None
    return None


def _looks_like(cause: str, site: ParameterSite, only: str = "") -> Iterator[Variant]:
    found, theirs = site.once(look), site.theirs
    if found is not None and found.cause == cause and theirs is not None and only in ("", site.name):
        yield changed(site, found.change, found.values or {site.name: theirs})


_INIT = "tensor left at its random init"
_LOAD = "load the tensor: its row in jaxgpt/weights.py, or a name that the reader skips (jaxgpt/formats/hf.py)"
_DAMAGE = "the checkpoint is damaged: restore it, or import it again"
_ADVICE: dict[str, str] = {
    "NaN or infinite values": _DAMAGE,
    "bias dropped": presence.BIAS,
    "tensor of zeros": _LOAD,
    _INIT: _LOAD,
    "norm weights folded into the next projection": "compare weights before folding, or fold the file's too",
    "embedding rows shifted": "row i belongs to token (or position) i: look for an offset where it is loaded",
    "read from a wrong offset": "data_offsets of the tensor in the header (jaxgpt/formats/safetensors_file.py)",
    "a few elements corrupted": _DAMAGE,
    "some elements zeroed": "the checkpoint was pruned or masked: import the file again",
    "tensor scaled by a constant": "where the tensor is loaded (jaxgpt/weights.py), multiply by nothing",
    "weight dequantised from int8 or int4": "import the file itself, not a quantised copy of it",
    "values rounded to fewer bits": "keep the file's dtype wherever the tensor is read and stored",
    "a low-rank change, such as a merged adapter": "import the base model's file, or compare with the merged one",
    "weights of another revision": "import the revision that --reference names, or name the one that was imported",
    "weights of one layer altered": (
        "only this layer differs, throughout and by little: it was trained further alone, updated in part, or "
        "converted with loss (quantised, cast, noise added); import the layer again from the others' revision"
    ),
}
REPAIRS: tuple[Repair, ...] = (
    *presence.REPAIRS,
    *layouts.REPAIRS,
    *exchanges.REPAIRS,
    *encodings.REPAIRS,
    *_EXACT,
    *_BEHIND_ROUNDING,
    repair("lm_head untied and random", _LOAD, partial(_looks_like, _INIT, only=HEAD), last_resort=True),
    *(repair(cause, advice, partial(_looks_like, cause), last_resort=True) for cause, advice in _ADVICE.items()),
)
"""Narrow ones first."""
