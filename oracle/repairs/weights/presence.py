"""Parameters that one side lacks, tied and untied heads, and rows that one side has more of."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from oracle.repairs.repair import Repair, Variant
from oracle.repairs.weights.differences import unequal
from oracle.repairs.weights.parameter_repair import Undo, both, changed, repair
from oracle.rungs import bits
from oracle.rungs.bits import EMBEDDING, HEAD, ParameterSite, equal, without

TOKENS = (EMBEDDING, HEAD)
PROPORTIONAL = 1e-2
"""A head that is a multiple of the embedding up to this, relative to its size."""


def _tied(site: ParameterSite, tied: bool) -> ParameterSite:
    """The same place, the candidate's tie flag set."""
    config = replace(site.candidate.config, tie_word_embeddings=tied)
    candidate = replace(site.candidate, config=config)
    return replace(site, comparison=replace(site.comparison, candidate=candidate))


def relation(site: ParameterSite) -> str:
    """Of our own head to the embedding, where the file's model is tied: `equal`, `multiple`, `none`; or empty."""
    ours, embedding = site.ours, site.file.get(EMBEDDING)
    if site.name != HEAD or HEAD in site.file or ours is None or embedding is None:
        return ""
    if ours.shape != embedding.shape:
        return "none"
    if equal(ours, embedding):
        return "equal"
    a, b = ours.astype(np.float64), embedding.astype(np.float64)
    scale = float((a * b).sum() / np.square(b).sum())
    apart = float(np.square(a - scale * b).sum()) ** 0.5
    return "multiple" if scale and apart < PROPORTIONAL * float(np.square(a).sum()) ** 0.5 else "none"


def _untied(expected: str) -> Undo:
    def undo(site: ParameterSite) -> Iterator[Variant]:
        if site.once(relation) == expected:
            yield Variant("with the embedding as the head", without(_tied(site, tied=True).candidate, HEAD))

    return undo


def wrongly_tied(site: ParameterSite) -> Iterator[Variant]:
    """The file has a head of its own, and ours is the embedding, by the flag or by its values."""
    theirs, ours, embedding = site.theirs, site.ours, site.candidate.stored.get(EMBEDDING)
    if site.name != HEAD or theirs is None or embedding is None:
        return
    config = site.candidate.config
    if config.tie_word_embeddings:
        head = ours if ours is not None and equal(ours, theirs) else theirs
        yield changed(_tied(site, tied=False), "with the file's head, untied", {HEAD: head})
    elif ours is not None and equal(ours, np.asarray(embedding)):
        yield changed(site, "with the file's head", {HEAD: theirs})


# -- Missing and left over -------------------------------------------------------------


def _missing(bias: bool) -> Undo:
    """All of the kind at once: what is dropped is dropped in every layer."""

    def undo(site: ParameterSite) -> Iterator[Variant]:
        if site.ours is not None or site.theirs is None or (site.finding.op == "bias") != bias or site.name == HEAD:
            return
        lacking = [name for name in site.file if name not in site.candidate.stored and name != HEAD]
        alike = {name: site.file[name] for name in lacking if name.endswith(".bias") == bias}
        yield changed(site, f"with the file's {_counted(len(alike), 'bias' if bias else 'parameter')}", alike)

    return undo


def _counted(count: int, name: str) -> str:
    return name if count == 1 else f"{count} {name}es" if name.endswith("s") else f"{count} {name}s"


def extra(site: ParameterSite) -> Iterator[Variant]:
    """What the file's model does not have."""
    if site.ours is not None and site.theirs is None and not site.once(relation):
        yield Variant("without it", without(site.candidate, site.name))


# -- Rows ------------------------------------------------------------------------------


def _rows(site: ParameterSite) -> tuple[np.ndarray, np.ndarray] | None:
    ours, theirs = site.ours, site.theirs
    if ours is None or theirs is None or ours.ndim != 2 or ours.shape[1:] != theirs.shape[1:]:
        return None
    return ours, theirs


def more_rows(site: ParameterSite) -> Iterator[Variant]:
    """Rows beyond the file's vocabulary."""
    found = _rows(site)
    if found is None or site.name not in TOKENS:
        return
    ours, theirs = found
    if len(ours) > len(theirs) and equal(ours[: len(theirs)], theirs):
        config = replace(site.candidate.config, vocab_size=len(theirs))
        stored = {name: array for name, array in site.candidate.stored.items() if name in TOKENS}
        cut = {name: np.asarray(array)[: len(theirs)] for name, array in stored.items()}
        candidate = bits.with_parameters(replace(site.candidate, config=config), cut)
        yield Variant(f"without the rows from {len(theirs)} on", candidate)


def fewer_rows(site: ParameterSite) -> Iterator[Variant]:
    """Rows of the file that are left out."""
    found = _rows(site)
    if found is not None and len(found[0]) < len(found[1]) and equal(found[0], found[1][: len(found[0])]):
        yield changed(site, f"with the file's rows from {len(found[0])} on", {site.name: found[1]})


@both
def live_padding(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """The last rows of the vocabulary, which are no tokens, hold something."""
    start = _changed_from(site, ours, theirs)
    if site.name in TOKENS and start is not None and ours[start:].any():
        yield changed(site, f"with the file's rows from {start} on", {site.name: theirs})


@both
def truncated_rows(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Variant]:
    """The last rows are zero, where the file's are not."""
    start = _changed_from(site, ours, theirs)
    if start is not None and not ours[start:].any():
        yield changed(site, f"with the file's rows from {start} on", {site.name: theirs})


def _changed_from(site: ParameterSite, ours: np.ndarray, theirs: np.ndarray) -> int | None:
    """The row from which on every row differs in most elements, all before it being equal; padding alone is a quarter
    of the rows at most, and begins at the first id that is none, where that is known."""
    if ours.shape != theirs.shape or ours.ndim != 2:
        return None
    share = unequal(ours, theirs).mean(axis=1)
    start = int(np.argmax(share > 0))
    real = site.candidate.real_ids
    if start * 4 < len(ours) * 3 or float(share[start:].min()) < 0.5 or (real is not None and start < real):
        return None
    return start


_TIE = "tie_word_embeddings in the config (jaxgpt/config.py reads it), and _drop_tied_head in jaxgpt/formats/hf.py"
BIAS = "load the bias: qkv_bias, attention_output_bias, mlp_bias of the config, and its row in jaxgpt/weights.py"
_VOCABULARY = "cut the embedding and the head to the ids that are real where they are loaded, or mask the others"
REPAIRS: tuple[Repair, ...] = (
    repair("lm_head untied and random", f"the file has no head because it is tied: {_TIE}", _untied("none")),
    repair("tied head with wrong sign or scale", f"use the embedding itself as the head: {_TIE}", _untied("multiple")),
    repair("lm_head untied though tied in the file", _TIE, _untied("equal")),
    repair("lm_head wrongly tied", f"the file has a head of its own: {_TIE}", wrongly_tied),
    repair("padded vocabulary rows live", _VOCABULARY, more_rows),
    repair("extra parameter", "the file's model has no such parameter: the flags in its config.json", extra),
)
LOSSES: tuple[Repair, ...] = (
    repair(
        "bias dropped",
        BIAS,
        _missing(bias=True),
        last_resort=True,
    ),
    repair(
        "parameter missing",
        "a row for it in jaxgpt/weights.py, or a tensor that the reader skips (jaxgpt/formats/hf.py)",
        _missing(bias=False),
        last_resort=True,
    ),
    repair("padded vocabulary rows live", _VOCABULARY, live_padding, last_resort=True),
    repair("rows truncated", "load every row (jaxgpt/formats/hf.py), vocab_size", truncated_rows, last_resort=True),
    repair("rows truncated", "load every row (jaxgpt/formats/hf.py), vocab_size", fewer_rows, last_resort=True),
)
