"""What repairs of stored parameters have in common: where they apply, and what they are told.

They are measured bit for bit against the file (rung bits) or, where that rung was not
run, by what an op computes with the parameter (rung operators).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import wraps

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.rungs import bits, operators
from oracle.rungs.bits import ParameterSite
from oracle.rungs.operators import OpSite
from oracle.site import Site

Undo = Callable[[ParameterSite], Iterator[Variant]]
"""Ways to undo one cause at one parameter; none where its traces are not there."""
UndoPair = Callable[[ParameterSite, np.ndarray, np.ndarray], Iterator[Variant]]
"""The same, given the candidate's tensor and the file's."""


def repair(cause: str, advice: str, undo: Undo, *, last_resort: bool = False) -> Repair:
    """A repair of parameters, for the rungs that see them."""

    def variants(site: Site) -> Iterator[Variant]:
        if isinstance(site, ParameterSite):
            for variant in undo(site):
                yield replace(variant, advice=_of_export(advice) if site.finding.where == "export" else advice)
        elif isinstance(site, OpSite) and site.op.parameters:
            yield from _of_op(site, undo)

    return Repair(cause, advice, (bits.NAME, operators.NAME), variants, last_resort)


def _of_export(advice: str) -> str:
    return f"checkpoint and export differ, so look at to_hf in jaxgpt/weights.py first; as for an import: {advice}"


def _of_op(site: OpSite, undo: Undo) -> Iterator[Variant]:
    """One variant with the same undone at every wrong parameter of the op: kernel and bias are used together."""
    comparison, change = site.comparison, ""
    for found in site.once(_wrong_parameters):
        variant = next(undo(replace(found, comparison=comparison)), None)
        if variant is not None:
            comparison, change = replace(comparison, candidate=variant.candidate), change or variant.change
    if change:
        yield Variant(change, comparison.candidate)


def _wrong_parameters(site: OpSite) -> list[ParameterSite]:
    return bits.of_module(site.comparison, site.op.parameters)


def both(undo: UndoPair) -> Undo:
    """An `Undo` that needs the candidate's tensor and the file's."""

    @wraps(undo)
    def undo_pair(site: ParameterSite) -> Iterator[Variant]:
        ours, theirs = site.ours, site.theirs
        if ours is not None and theirs is not None and ours.ndim and ours.size and theirs.size:
            yield from undo(site, ours, theirs)

    return undo_pair


def changed(site: ParameterSite, change: str, values: Mapping[str, np.ndarray]) -> Variant:
    """A variant in which some parameters have other values."""
    return Variant(change, bits.with_parameters(site.candidate, values))
