"""Repairs of the packer: what a batch holds.

The packer stays a black box. The corpus tells much about it: packed once more with
other tokens (each one's flag, each one's document, each one's neighbour) it shows where
every token went, and one array can be computed anew by undoing a single mistake.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.settings import TrainSettings
from oracle.candidate import Candidate
from oracle.repairs.repair import Repair, Variant
from oracle.rungs import loss
from oracle.site import Site
from oracle.training import Packer
from oracle.training_probe import Corpus, Ids
from oracle.training_site import TrainingSite, trained

Arrays = dict[str, Any]

# -- The corpus with other tokens ------------------------------------------------------


def _documents(stream: Sequence[int], corpus: Corpus) -> tuple[Ids, ...]:
    """A stream cut where the corpus's documents are."""
    ends = np.cumsum([len(document) for document in corpus.documents]).tolist()
    return tuple(tuple(stream[end - len(document) : end]) for end, document in zip(ends, corpus.documents, strict=True))


def moved(corpus: Corpus, by: int) -> Corpus:
    """Every token gives its place to the one `by` places behind it; lengths and flags stay."""
    return episodes_moved(documents_moved(corpus, by), by)


def documents_moved(corpus: Corpus, by: int) -> Corpus:
    """The same of the documents alone."""
    stream = [token for document in corpus.documents for token in document]
    return Corpus(_documents(np.roll(stream, -by).tolist(), corpus), corpus.episodes)


def episodes_moved(corpus: Corpus, by: int) -> Corpus:
    """The same of the episodes alone."""
    episodes = tuple((tuple(np.roll(ids, -by).tolist()), flags) for ids, flags in corpus.episodes)
    return Corpus(corpus.documents, episodes)


def flags_as_tokens(corpus: Corpus) -> Corpus:
    """1 for each token that is trained, 0 for each that is only read."""
    documents = tuple((1,) * len(document) for document in corpus.documents)
    return Corpus(documents, tuple((flags, flags) for _, flags in corpus.episodes))


def documents_as_tokens(corpus: Corpus) -> Corpus:
    """The number of each token's document or episode, from 1."""
    documents = tuple((number,) * len(ids) for number, ids in enumerate(corpus.documents, start=1))
    episodes = tuple(((number,) * len(ids), flags) for number, (ids, flags) in enumerate(corpus.episodes, start=1))
    return Corpus(documents, episodes)


def episodes_as_tokens(corpus: Corpus) -> Corpus:
    """The number of each token's episode, from 1; 0 in documents."""
    return Corpus(tuple((0,) * len(ids) for ids in corpus.documents), documents_as_tokens(corpus).episodes)


def places_as_tokens(corpus: Corpus) -> Corpus:
    """The place of each token in its document or episode."""
    documents = tuple(tuple(range(len(ids))) for ids in corpus.documents)
    return Corpus(documents, tuple((tuple(range(len(ids))), flags) for ids, flags in corpus.episodes))


def _same(corpus: Corpus) -> Corpus:
    return corpus


# -- The packer ------------------------------------------------------------------------

Outputs = list[Arrays]
"""Micro-batches."""


@dataclass(frozen=True)
class Packing:
    """What the candidate's packer makes of a corpus."""

    pack: Packer
    corpus: Corpus
    settings: TrainSettings

    def of(self, other: Callable[[Corpus], Corpus]) -> Outputs:
        """The micro-batches of the corpus with other tokens."""
        batches: Any = self.pack(other(self.corpus), self.settings)
        return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def packer(candidate: Candidate, change: Callable[[Packing], Outputs]) -> Candidate:
    """The candidate with `change` in place of what its packer gives."""
    pack = candidate.training.batches

    def repaired(corpus: Corpus, settings: TrainSettings) -> Any:
        return change(Packing(pack, corpus, settings))

    return trained(candidate, batches=repaired)


def _each(
    name: str, of: Callable[..., np.ndarray], *others: Callable[[Corpus], Corpus]
) -> Callable[[Packing], Outputs]:
    """One array of every micro-batch computed anew from the micro-batch and the same with other tokens."""

    def change(packing: Packing) -> Outputs:
        outputs = [packing.of(other) for other in (_same, *others)]
        return [batches[0] | {name: of(*batches)} for batches in zip(*outputs, strict=True)]

    return change


def of_batch(site: Site, *names: str) -> bool:
    """The difference began in one of these arrays of a batch."""
    return isinstance(site, TrainingSite) and site.finding.tap in {loss.BATCH + name for name in names}


def _repacked(
    words: str, name: str, of: Callable[..., np.ndarray], *others: Callable[[Corpus], Corpus]
) -> Callable[[Site], Iterator[Variant]]:
    """A repair of the array `name` where the difference began in it."""

    def variants(site: Site) -> Iterator[Variant]:
        if of_batch(site, name):
            yield Variant(words, packer(site.candidate, _each(name, of, *others)))

    return variants


# -- Targets and masks -----------------------------------------------------------------


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
    corpus = f"with the targets of a corpus moved {'on' if by > 0 else 'back'} by one token"
    ways: dict[str, Callable[[Arrays, Arrays], np.ndarray]] = {
        corpus: lambda _, other: other["targets"],
        f"with the targets {words}": lambda batch, _: _rolled(batch["targets"], -by),
        f"with the targets {words}, those at the edge from a corpus moved by one token": (
            lambda batch, other: _rolled(batch["targets"], -by, other["targets"])
        ),
    }

    parts: dict[str, Callable[[Corpus, int], Corpus]] = {"documents": documents_moved, "episodes": episodes_moved}

    def variants(site: Site) -> Iterator[Variant]:
        for change, of in ways.items():
            yield from _repacked(change, "targets", of, lambda corpus: moved(corpus, by))(site)
        for part, some in parts.items():
            change, of = f"{corpus}, its {part} alone", ways[corpus]
            yield from _repacked(change, "targets", of, lambda corpus, some=some: some(corpus, by))(site)

    return variants


def _shifted_mask(site: Site) -> Iterator[Variant]:
    for by, words in ((1, "one place earlier"), (-1, "one place later")):
        ways = (
            lambda batch, by=by: _rolled(batch["mask"], -by),
            # What was lost at the edge is what stands beside it.
            lambda batch, by=by: _rolled(batch["mask"], -by, batch["mask"]),
        )
        for of in ways:
            yield from _repacked(f"with the loss mask {words}", "mask", of)(site)


def _kept(words: str, keep: Callable[..., np.ndarray], *others: Callable[[Corpus], Corpus]) -> Any:
    """The mask, but only where `keep` (from the batch and the same packed with other tokens) is true."""
    return _repacked(words, "mask", lambda batch, *again: batch["mask"] * keep(batch, *again), *others)


def _not_padding(batch: Arrays) -> np.ndarray:
    return batch["segments"] > 0


def _same_document(_: Arrays, numbers: Arrays) -> np.ndarray:
    return numbers["targets"] == numbers["ids"]


def _flagged(batch: Arrays, flags: Arrays) -> np.ndarray:
    # Padding has no flag, and is another fault.
    return (flags["targets"] > 0) | (batch["segments"] == 0)


def _untrained_ends(site: Site) -> Iterator[Variant]:
    """Targets and mask where the next token is the last of a reply; nowhere else."""
    if of_batch(site, "mask", "targets"):
        yield Variant("with the last token of each reply trained", packer(site.candidate, _with_ends))


def _with_ends(packing: Packing) -> Outputs:
    again = (_same, episodes_as_tokens, places_as_tokens)
    return [_ends_set(packing.corpus, *batches) for batches in zip(*map(packing.of, again), strict=True)]


def _ends_set(corpus: Corpus, batch: Arrays, numbers: Arrays, places: Arrays) -> Arrays:
    targets, mask = batch["targets"].copy(), batch["mask"].copy()
    for at in np.argwhere(numbers["ids"] > 0).tolist():
        ids, flags = corpus.episodes[numbers["ids"][*at] - 1]
        target = int(places["ids"][*at]) + 1
        if target < len(ids) and flags[target] and not any(flags[target + 1 : target + 2]):
            targets[*at], mask[*at] = ids[target], 1
    return batch | {"targets": targets, "mask": mask}


# -- Documents of a row ----------------------------------------------------------------


def _begins(numbers: Arrays) -> np.ndarray:
    """Places where another document begins than that of the place before; padding is none."""
    ids = numbers["ids"]
    before = np.pad(ids[:, :-1], ((0, 0), (1, 0)))
    return (ids != before) & (ids > 0)


def _restarted(batch: Arrays, numbers: Arrays) -> np.ndarray:
    """Positions that count on through a row, less the place at which the document begins."""
    places = np.arange(batch["positions"].shape[1])
    return batch["positions"] - np.maximum.accumulate(np.where(_begins(numbers), places, 0), axis=1)


def _told_apart(batch: Arrays, numbers: Arrays) -> np.ndarray:
    """One segment number for everything becomes one for each document."""
    segments, real = batch["segments"], numbers["ids"] > 0
    if len(np.unique(segments[real])) != 1:
        return segments
    return np.where(real, np.cumsum(_begins(numbers), axis=1), 0).astype(segments.dtype)


# -- All of them -----------------------------------------------------------------------

_WHERE = "where micro-batches are filled (jaxgpt/data/batches.py)"
_LOSS = (loss.NAME,)

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "padding trained",
        f"leave the mask 0 at places without a token, {_WHERE}",
        _LOSS,
        _kept("with the loss mask 0 in padding", _not_padding),
    ),
    Repair(
        "first token of a document predicted from the document before",
        f"leave the mask 0 where the next token begins another document, {_WHERE}",
        _LOSS,
        _kept("with the loss mask 0 where the target is of another document", _same_document, documents_as_tokens),
    ),
    Repair(
        "loss over prompt tokens too",
        f"take the mask of the rendered episode, {_WHERE}",
        _LOSS,
        _kept("with the loss mask 0 where the target's token is not trained", _flagged, flags_as_tokens),
    ),
    Repair(
        "end-of-reply token not trained",
        f"leave the mask 1 at the last token of each reply, so that the model learns to stop, {_WHERE}",
        _LOSS,
        _untrained_ends,
    ),
    Repair(
        "positions run on across documents",
        f"count positions from 0 in each document of a row, {_WHERE}",
        _LOSS,
        _repacked("with positions from 0 in each document", "positions", _restarted, documents_as_tokens),
    ),
    Repair(
        "segments lost",
        f"number the documents of a row from 1, so that none attends to another, {_WHERE}",
        _LOSS,
        _repacked("with a segment for each document", "segments", _told_apart, documents_as_tokens),
    ),
    Repair(
        "loss mask off by one",
        f"the mask belongs to the target: mask[t] says whether token t + 1 is trained, {_WHERE}",
        _LOSS,
        _shifted_mask,
    ),
    Repair(
        "label shift missing",
        f"the target of place t is token t + 1, {_WHERE}",
        _LOSS,
        _shifted_targets(1),
    ),
    Repair(
        "label shift doubled",
        f"shift the targets once: either {_WHERE} or in the loss",
        _LOSS,
        _shifted_targets(-1),
    ),
)
"""Narrow ones first."""
