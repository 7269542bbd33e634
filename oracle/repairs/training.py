"""Repairs of batches, losses and their accumulation.

The candidate's functions stay black boxes: what a repair changes is the corpus or the
batch that goes in, or the arrays that come out. The corpus tells much about a packer:
packed once more with other tokens (each one's flag, each one's document, each one's
neighbour) it shows where every token went.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.settings import TrainSettings
from oracle import training_probe
from oracle.candidate import Candidate
from oracle.repairs import optimization
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import gradients, loss, optimizer
from oracle.site import Site
from oracle.training import Packer
from oracle.training_probe import Corpus, Ids
from oracle.training_site import TrainingSite, trained

Arrays = dict[str, Any]
Change = Callable[[Arrays, Callable[[Corpus], list[Arrays]], Corpus], list[Arrays]]

# -- The packer ------------------------------------------------------------------------


def _documents(stream: Sequence[int], corpus: Corpus) -> tuple[Ids, ...]:
    """A stream cut where the corpus's documents are."""
    ends = np.cumsum([len(document) for document in corpus.documents]).tolist()
    return tuple(tuple(stream[end - len(document) : end]) for end, document in zip(ends, corpus.documents, strict=True))


def moved(corpus: Corpus, by: int) -> Corpus:
    """Every token gives its place to the one `by` places behind it; lengths and flags stay."""
    stream = [token for document in corpus.documents for token in document]
    documents = _documents(np.roll(stream, -by).tolist(), corpus)
    return Corpus(documents, tuple((tuple(np.roll(ids, -by).tolist()), flags) for ids, flags in corpus.episodes))


def flags_as_tokens(corpus: Corpus) -> Corpus:
    """1 for each token that is trained, 0 for each that is only read."""
    documents = tuple((1,) * len(document) for document in corpus.documents)
    return Corpus(documents, tuple((flags, flags) for _, flags in corpus.episodes))


def documents_as_tokens(corpus: Corpus) -> Corpus:
    """The number of each token's document or episode, from 1."""
    documents = tuple((number,) * len(ids) for number, ids in enumerate(corpus.documents, start=1))
    episodes = tuple(((number,) * len(ids), flags) for number, (ids, flags) in enumerate(corpus.episodes, start=1))
    return Corpus(documents, episodes)


Outputs = list[Arrays]
"""Micro-batches."""
Repacked = Callable[[Callable[[Corpus], Corpus]], Outputs]
"""The micro-batches of a changed corpus."""


def _packer(candidate: Candidate, change: Callable[[Outputs, Repacked], Outputs]) -> Candidate:
    """The candidate with `change` made to what its packer gives."""
    pack: Packer = candidate.training.batches

    def repaired(corpus: Corpus, settings: TrainSettings) -> Any:
        def repacked(other: Callable[[Corpus], Corpus]) -> Outputs:
            batches: Any = pack(other(corpus), settings)
            return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]

        return change(repacked(lambda same: same), repacked)

    return trained(candidate, batches=repaired)


def _each(name: str, of: Callable[..., np.ndarray]) -> Callable[..., Outputs]:
    """One array of every micro-batch computed anew from the micro-batch and others made beside it."""

    def change(*outputs: Outputs) -> Outputs:
        return [batches[0] | {name: of(*batches)} for batches in zip(*outputs, strict=True)]

    return change


def _of_batch(site: Site, *names: str) -> bool:
    return isinstance(site, TrainingSite) and site.finding.tap in {loss.BATCH + name for name in names}


def _rolled(array: np.ndarray, by: int, edge: np.ndarray | None = None) -> np.ndarray:
    """Moved along the row; what would come round at the edge is taken from `edge`, if there is one."""
    turned = np.roll(array, by, axis=-1)
    if edge is not None:
        column = -1 if by < 0 else 0
        turned[..., column] = edge[..., column]
    return turned


def _shifted_targets(by: int) -> Callable[[Site], Iterator[Variant]]:
    """Targets that stand `by` places too late (1) or too early (−1)."""
    words = "one place earlier" if by > 0 else "one place later"

    def variants(site: Site) -> Iterator[Variant]:
        if _of_batch(site, "targets"):
            corpus = f"with the targets of a corpus moved {'on' if by > 0 else 'back'} by one token"
            ways: dict[str, Callable[[Arrays, Arrays], np.ndarray]] = {
                corpus: lambda _, other: other["targets"],
                f"with the targets {words}": lambda batch, _: _rolled(batch["targets"], -by),
                f"with the targets {words}, those at the edge from a corpus moved by one token": (
                    lambda batch, other: _rolled(batch["targets"], -by, other["targets"])
                ),
            }
            for change, of in ways.items():
                made = _each("targets", of)
                yield Variant(
                    change,
                    _packer(site.candidate, lambda out, again, made=made: made(out, again(lambda c: moved(c, by)))),
                )
        else:
            yield from _of_functions(
                site, f"with the targets {words}", lambda b: b | {"targets": jnp.roll(b["targets"], -by, -1)}
            )

    return variants


def _shifted_mask(site: Site) -> Iterator[Variant]:
    for by, words in ((1, "one place earlier"), (-1, "one place later")):
        change = f"with the loss mask {words}"
        if _of_batch(site, "mask"):
            ways = (
                lambda batch, by=by: _rolled(batch["mask"], -by),
                # What was lost at the edge is what stands beside it.
                lambda batch, by=by: _rolled(batch["mask"], -by, batch["mask"]),
            )
            for of in ways:
                made = _each("mask", of)
                yield Variant(change, _packer(site.candidate, lambda out, _, made=made: made(out)))
        else:
            yield from _of_functions(site, change, lambda b, by=by: b | {"mask": jnp.roll(b["mask"], -by, -1)})


def _kept(words: str, keep: Callable[[Arrays, Arrays], np.ndarray], other: Callable[[Corpus], Corpus]) -> Any:
    """The mask, but only where `keep` (from the batch and the same packed with other tokens) is true."""

    def variants(site: Site) -> Iterator[Variant]:
        if _of_batch(site, "mask"):
            made = _each("mask", lambda batch, again: batch["mask"] * keep(batch, again))
            yield Variant(words, _packer(site.candidate, lambda out, again: made(out, again(other))))

    return variants


def _not_padding(batch: Arrays, _: Arrays) -> np.ndarray:
    return batch["segments"] > 0


def _same_document(_: Arrays, numbers: Arrays) -> np.ndarray:
    return numbers["targets"] == numbers["ids"]


def _flagged(batch: Arrays, flags: Arrays) -> np.ndarray:
    # Padding has no flag, and is another fault.
    return (flags["targets"] > 0) | (batch["segments"] == 0)


# -- What the losses are given ---------------------------------------------------------


def _of_functions(site: Site, change: str, on: Callable[[Arrays], Arrays]) -> Iterator[Variant]:
    """The same change of the batch for every function that gives a wrong loss."""
    if not isinstance(site, TrainingSite) or site.finding.tap.startswith(loss.BATCH) or site.rung == optimizer.NAME:
        return
    training = site.candidate.training
    position = {"losses": 2, "gradients": 4, "step": 4}
    wrapped = {name: _with_input(getattr(training, name), position[name], on) for name in site.wrong_functions()}
    if wrapped:
        yield Variant(change, trained(site.candidate, **wrapped))


def _with_input(function: Callable[..., Any], position: int, on: Callable[[Arrays], Arrays]) -> Callable[..., Any]:
    def repaired(*given: Any) -> Any:
        return function(*given[:position], on(dict(given[position])), *given[position + 1 :])

    return repaired


def _dropout_off(site: Site) -> Iterator[Variant]:
    if not isinstance(site, TrainingSite) or site.finding.tap != loss.TOKENS:
        return
    function = site.candidate.training.losses

    def repaired(config: Any, *given: Any) -> Any:
        return function(training_probe.without_dropout(config), *given)

    yield Variant("with all dropout rates 0", trained(site.candidate, losses=repaired))


# -- Accumulation ----------------------------------------------------------------------


def _equal_shares(site: Site) -> Iterator[Variant]:
    """Every micro-batch gets all rows of the step, each counting for its share: equal numbers of trained tokens."""
    if not isinstance(site, TrainingSite) or site.finding.tap.startswith(loss.BATCH):
        return
    names = [name for name in site.wrong_functions() if name != "losses"]
    training = site.candidate.training
    wrapped = {name: _with_input(getattr(training, name), 4, _shared) for name in names}
    if wrapped:
        change = "with all rows in every micro-batch, so that each has as many trained tokens"
        yield Variant(change, trained(site.candidate, **wrapped))


def _shared(batches: Arrays) -> Arrays:
    """(A, B, T) to (A, A·B, T), the mask divided by a power of two near A: sums of such numbers are exact."""
    count = next(iter(batches.values())).shape[0]

    def all_rows(array: Any) -> Any:
        rows = array.reshape(-1, array.shape[-1])
        return jnp.broadcast_to(rows, (count, *rows.shape))

    shared = {name: all_rows(array) for name, array in batches.items()}
    return shared | {"mask": shared["mask"] / 2 ** (count - 1).bit_length()}


def _divided(site: Site) -> Iterator[Variant]:
    """Loss and gradients divided by the number of micro-batches."""
    if not isinstance(site, TrainingSite) or site.rung == optimizer.NAME:
        return
    if "gradients" not in site.wrong_functions():
        return
    function = site.candidate.training.gradients

    def repaired(*given: Any) -> Any:
        value, found = function(*given)
        count = given[4]["ids"].shape[0]
        return value / count, {name: array / count for name, array in found.items()}

    yield Variant("divided by the number of micro-batches", trained(site.candidate, gradients=repaired))


# -- All of them -----------------------------------------------------------------------

_BATCHES = "where micro-batches are filled (jaxgpt/data/batches.py)"
_LOSSES = (loss.NAME, gradients.NAME)

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "padding trained",
        f"leave the mask 0 at places without a token, {_BATCHES}",
        (loss.NAME,),
        _kept("with the loss mask 0 in padding", _not_padding, lambda same: same),
    ),
    Repair(
        "first token of a document predicted from the document before",
        f"leave the mask 0 where the next token begins another document, {_BATCHES}",
        (loss.NAME,),
        _kept("with the loss mask 0 where the target is of another document", _same_document, documents_as_tokens),
    ),
    Repair(
        "loss over prompt tokens too",
        f"take the mask of the rendered episode, {_BATCHES}",
        (loss.NAME,),
        _kept("with the loss mask 0 where the target's token is not trained", _flagged, flags_as_tokens),
    ),
    Repair(
        "loss mask off by one",
        f"the mask belongs to the target: mask[t] says whether token t + 1 is trained, {_BATCHES}",
        _LOSSES,
        _shifted_mask,
    ),
    Repair(
        "label shift missing",
        f"the target of place t is token t + 1, {_BATCHES} or where the loss takes them",
        _LOSSES,
        _shifted_targets(1),
    ),
    Repair(
        "label shift doubled",
        f"shift the targets once: either {_BATCHES} or in the loss",
        _LOSSES,
        _shifted_targets(-1),
    ),
    Repair(
        "dropout left on",
        "compute losses that are only looked at without dropout: no rng for jaxgpt.model.forward",
        (loss.NAME,),
        _dropout_off,
    ),
    Repair(
        "micro-batches summed without dividing",
        "divide the summed losses once, by the trained tokens of the whole step (jaxgpt/train_step.py)",
        _LOSSES,
        _divided,
    ),
    Repair(
        "gradient accumulation normalised per micro-batch",
        "divide the summed losses once, by the trained tokens of the whole step (jaxgpt/train_step.py)",
        (*_LOSSES, optimizer.NAME),
        _equal_shares,
    ),
    *optimization.REPAIRS,
)
"""Narrow ones first."""
