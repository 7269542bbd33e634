"""Batches of fixed shape (B, T) from token shards or chat episodes, at a position that can be saved.

Both sources are rows of T places; a row holds whole or cut documents, told apart by
`segments`, and no token predicts a token of another document. Rows are visited in
a new seeded order each epoch; the position is one number, so that a restored
iterator continues with exactly the batch that would have come.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from jaxgpt.chat import Rendered
from jaxgpt.data.episodes import Episodes, fingerprint_of
from jaxgpt.data.shards import TokenShards, sha256_of_json
from jaxgpt.errors import InputError


class Batch(TypedDict):
    """Arrays (B, T); `targets[b, t]` is what place t should predict."""

    ids: np.ndarray
    """int32; 0 in padding."""
    targets: np.ndarray
    """int32: the next token of the same document; 0 where `mask` is 0."""
    mask: np.ndarray
    """float32: 1 where the loss counts."""
    positions: np.ndarray
    """int32, from 0 in each segment."""
    segments: np.ndarray
    """int32: 0 is padding, documents count from 1 in each row."""


class DataEnded(InputError):
    """All epochs have been served.

    `batches` is how many there were; the training loop, which knows how many steps
    were asked for, says so with `at_step`.
    """

    def __init__(self, batches: int, message: str = ""):
        super().__init__(message or f"corpus ended after {batches} batches; pass --epochs to repeat")
        self.batches = batches

    def at_step(self, step: int, steps: int) -> "DataEnded":
        """The same, naming the training step it happened at."""
        return DataEnded(self.batches, f"corpus ended at step {step} of {steps}; pass --epochs to repeat")


class Rows(Protocol):
    """A fixed number of rows of T places."""

    sequence_length: int

    def __len__(self) -> int: ...

    def fill(self, row: int, batch: Batch, b: int) -> None:
        """Write row `row` into line `b` of a batch of zeros."""
        ...

    def data(self) -> dict[str, Any]:
        """JSON: what the rows are made of; equal only for equal rows."""
        ...


def empty_batch(batch_size: int, sequence_length: int) -> Batch:
    """A batch that is all padding."""
    shape = (batch_size, sequence_length)
    return Batch(
        ids=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        mask=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
    )


class WindowRows:
    """The token stream cut into windows of T.

    Each token is a target exactly once, except the first of a document: nothing of
    its own document precedes it. The last window may be short.
    """

    def __init__(self, shards: TokenShards, sequence_length: int):
        self.shards = shards
        self.sequence_length = _at_least_one("sequence_length", sequence_length)

    def __len__(self) -> int:
        # The last token of the stream predicts nothing.
        return max(1, -(-(self.shards.tokens - 1) // self.sequence_length))

    def fill(self, row: int, batch: Batch, b: int) -> None:
        """Write window `row` into line `b`."""
        T = self.sequence_length
        start = row * T
        tokens = self.shards.read(start, start + T + 1)
        begins = np.zeros(len(tokens), bool)
        low, high = np.searchsorted(self.shards.starts, (start, start + len(tokens)))
        begins[self.shards.starts[low:high] - start] = True
        n = min(T, len(tokens))
        batch["ids"][b, :n] = tokens[:n]
        # A document that goes on from the window before begins again: its past is not here.
        begins_here = begins[:n].copy()
        begins_here[0] = True
        places = np.arange(n)
        batch["positions"][b, :n] = places - np.maximum.accumulate(np.where(begins_here, places, 0))
        batch["segments"][b, :n] = np.cumsum(begins_here)
        trained = ~begins[1:]
        batch["targets"][b, : len(trained)] = np.where(trained, tokens[1:], 0)
        batch["mask"][b, : len(trained)] = trained

    def data(self) -> dict[str, Any]:
        """Fingerprint of the shards and their number of tokens."""
        return {"fingerprint": self.shards.fingerprint, "count": self.shards.tokens, "unit": "tokens"}


class EpisodeRows:
    """Episodes in rows: packed first-fit, or one a row.

    An episode of L tokens takes L - 1 places: its last token is only a target.
    Episodes are never cut.

    Raises:
        InputError: an episode does not fit into T places.
    """

    OPEN_ROWS = 1024
    """First-fit looks at the newest so many rows, which keeps packing linear."""

    def __init__(self, episodes: Sequence[Rendered], sequence_length: int, *, packed: bool = True, seed: int = 0):
        self.episodes = episodes
        self.sequence_length = _at_least_one("sequence_length", sequence_length)
        self.packed = packed
        lengths = np.asarray([len(episode.ids) - 1 for episode in episodes], np.int64)
        if not len(lengths):
            raise InputError("no episodes to train on; give chat JSONL with at least one trained row")
        if lengths.max() > sequence_length or lengths.min() < 1:
            raise InputError(
                f"episodes have {lengths.min() + 1} to {lengths.max() + 1} tokens, expected 2 to "
                f"{sequence_length + 1}; read them with this sequence length, which drops the others"
            )
        order = permutation(len(episodes), seed, epoch=0) if packed else np.arange(len(episodes))
        self.rows = self._first_fit(order, lengths) if packed else [[int(i)] for i in order]

    def _first_fit(self, order: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        rows: list[list[int]] = []
        free = np.zeros(len(order), np.int64)
        for i in order:
            oldest = max(0, len(rows) - self.OPEN_ROWS)
            fits = free[oldest : len(rows)] >= lengths[i]
            at = oldest + int(np.argmax(fits)) if fits.any() else len(rows)
            if at == len(rows):
                rows.append([])
                free[at] = self.sequence_length
            rows[at].append(int(i))
            free[at] -= lengths[i]
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, row: int, batch: Batch, b: int) -> None:
        """Write the episodes of `row` into line `b`."""
        at = 0
        for segment, index in enumerate(self.rows[row], 1):
            episode = self.episodes[index]
            n = len(episode.ids) - 1
            here = slice(at, at + n)
            mask = np.asarray(episode.mask[1:], np.float32)
            batch["ids"][b, here] = episode.ids[:-1]
            batch["targets"][b, here] = np.asarray(episode.ids[1:]) * (mask > 0)
            batch["mask"][b, here] = mask
            batch["positions"][b, here] = np.arange(n)
            batch["segments"][b, here] = segment
            at += n

    def data(self) -> dict[str, Any]:
        """Fingerprint of the episodes and their number."""
        return {"fingerprint": fingerprint_of(self.episodes), "count": len(self.episodes), "unit": "rows"}


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` rows in an epoch.

    From Philox's raw stream, which NumPy promises never to change (NEP 19);
    `Generator.permutation` has no such promise, and a resumed run must not depend
    on the version of NumPy.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2**64), got {seed}")
    return np.argsort(np.random.Philox(key=seed | epoch << 64).random_raw(count), kind="stable")


class Batches:
    """Batches of rows in seeded order, epoch after epoch; the last batch may hold padding rows.

    Rows that are left at the end of an epoch share a batch with the next epoch's.

    Args:
        rows: where the rows come from.
        batch_size: B.
        seed: of the order of rows.
        epochs: how often the data may be served; None means once, and that asking
            for more is a mistake either way.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, epochs: int | None = None):
        self.rows = rows
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.seed = seed
        self.epochs = 1 if epochs is None else _at_least_one("epochs", epochs)
        self.batches_served = 0
        self._order = (0, permutation(len(rows), seed, 0))
        self._identity: dict[str, Any] = {
            "data": rows.data(),
            "seed": seed,
            "batch_size": batch_size,
            "sequence_length": rows.sequence_length,
            "packed": getattr(rows, "packed", None),
        }

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one epoch alone takes, the last perhaps padded."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def total_batches(self) -> int:
        """Batches until DataEnded, counted from the beginning."""
        return -(-len(self.rows) * self.epochs // self.batch_size)

    @property
    def epoch(self) -> float:
        """Epochs served so far, as a fraction."""
        return self.batches_served * self.batch_size / len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which batches come."""
        return sha256_of_json(self._identity)

    def next(self) -> Batch:
        """The next batch.

        Raises:
            DataEnded: all epochs have been served.
            InputError: the data holds a token outside the vocabulary.
        """
        first = self.batches_served * self.batch_size
        end = len(self.rows) * self.epochs
        if first >= end:
            raise DataEnded(self.batches_served)
        batch = empty_batch(self.batch_size, self.rows.sequence_length)
        for b in range(min(self.batch_size, end - first)):
            self.rows.fill(self._row(first + b), batch, b)
        self.batches_served += 1
        return batch

    def _row(self, number: int) -> int:
        epoch, index = divmod(number, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.rows), self.seed, epoch))
        return int(self._order[1][index])

    def position(self) -> dict[str, Any]:
        """JSON for the checkpoint: where the next batch begins, and in which data."""
        return {"batches_served": self.batches_served, **self._identity}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue at a saved position; the next batch is the one that would have come.

        Raises:
            InputError: the position was saved with other data, another seed or
                another shape of batch, and which of them differs.
        """
        check_same_data("dataset", self._identity["data"], position["data"])
        for name in self._identity:
            if self._identity[name] != position[name]:
                change = f"{self._identity[name]} vs {position[name]}"
                raise InputError(f"{name} differs from checkpoint ({change}); resume with the same {name}")
        self.batches_served = int(position["batches_served"])


def check_same_data(what: str, data: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse rows of other data than the checkpoint's; both as `Rows.data` says, empty where there are no rows."""
    if data != saved:
        counts = f"{data.get('count', 0)} vs {saved.get('count', 0)} {(data or saved)['unit']}"
        raise InputError(f"{what} fingerprint differs from checkpoint ({counts}); resume with the same data")


class PretrainBatches(Batches):
    """Batches of windows of a split's token stream."""

    def __init__(
        self, shards: TokenShards, batch_size: int, sequence_length: int, seed: int, epochs: int | None = None
    ):
        super().__init__(WindowRows(shards, sequence_length), batch_size, seed, epochs)
        self.tokens_per_epoch = shards.tokens - shards.documents
        """Targets that count in one epoch."""


class EpisodeBatches(Batches):
    """Batches of chat episodes, packed or one a row."""

    def __init__(
        self,
        episodes: Episodes | Sequence[Rendered],
        batch_size: int,
        sequence_length: int,
        seed: int,
        epochs: int | None = None,
        packed: bool = True,
    ):
        kept = episodes.episodes if isinstance(episodes, Episodes) else episodes
        rows = EpisodeRows(kept, sequence_length, packed=packed, seed=seed)
        super().__init__(rows, batch_size, seed, epochs)
        self.tokens_per_epoch = sum(sum(episode.mask[1:]) for episode in kept)
        """Targets that count in one epoch."""


class Validation(Sequence[Batch]):
    """All rows of a held-out set in their own order, in batches; the last padded with mask 0."""

    def __init__(self, rows: Rows, batch_size: int, limit: int | None = None):
        self.rows = rows
        self.batch_size = _at_least_one("batch_size", batch_size)
        batches = -(-len(rows) // batch_size)
        self._length = batches if limit is None else min(batches, _at_least_one("limit", limit))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = (index % len(self)) * self.batch_size
        batch = empty_batch(self.batch_size, self.rows.sequence_length)
        for b in range(min(self.batch_size, len(self.rows) - first)):
            self.rows.fill(first + b, batch, b)
        return batch


def validation(
    source: TokenShards | Episodes | Sequence[Rendered],
    batch_size: int,
    sequence_length: int,
    *,
    packed: bool = True,
    limit: int | None = None,
) -> Validation:
    """Fixed batches for evaluation: every row once, in order; at most `limit` batches."""
    if isinstance(source, TokenShards):
        return Validation(WindowRows(source, sequence_length), batch_size, limit)
    episodes = source.episodes if isinstance(source, Episodes) else source
    return Validation(EpisodeRows(episodes, sequence_length, packed=packed), batch_size, limit)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
    return value
