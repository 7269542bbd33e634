"""Chat JSONL to rendered episodes: ids and loss mask, asserted before anything trains on them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.chat import Message, Rendered, Template, render
from jaxgpt.data.sources import check_unicode, json_rows
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Episodes:
    """The episodes that can train, and what was dropped."""

    episodes: list[Rendered]
    rows: int
    """Rows read."""
    untrained: int
    """Rows dropped because no token of them trains."""
    too_long: int
    """Rows dropped because they do not fit into the context; none is ever cut."""
    sequence_length: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids and masks, in order."""
        return fingerprint_of(self.episodes)

    def __str__(self) -> str:
        dropped = ""
        if self.untrained:
            dropped += f"; dropped {self.untrained:,} that train nothing"
        if self.too_long:
            dropped += f"; dropped {self.too_long:,} longer than {self.sequence_length + 1:,} tokens"
        tokens = sum(len(episode.ids) for episode in self.episodes)
        trained = sum(sum(episode.mask) for episode in self.episodes)
        return f"{self.rows:,} rows, {len(self.episodes):,} episodes, {tokens:,} tokens, {trained:,} trained{dropped}"


def fingerprint_of(episodes: Sequence[Rendered]) -> str:
    """SHA-256 over the ids and masks of episodes, in order."""
    digest = hashlib.sha256()
    for episode in episodes:
        digest.update(np.asarray([len(episode.ids), *episode.ids, *episode.mask], "<i8").tobytes())
    return digest.hexdigest()


def read_episodes(
    paths: str | Path | Sequence[str | Path], tokenizer: Tokenizer, template: Template, sequence_length: int
) -> Episodes:
    """Read chat JSONL: rows with `messages`, or with `prompt` and `completion`.

    Args:
        paths: one file or several.
        tokenizer: of the model.
        template: of the model.
        sequence_length: T of the batches; an episode may have T + 1 tokens, because
            its last token is never an input.

    Raises:
        InputError: a malformed row, with `file:line`; or no row is left to train on.
    """
    episodes: list[Rendered] = []
    rows = untrained = too_long = 0
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    for place, messages in read_messages(paths):
        rows += 1
        try:
            rendered = render(messages, tokenizer, template)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        check_mask(rendered, messages, tokenizer, template, place)
        if not any(rendered.mask):
            untrained += 1
        elif len(rendered.ids) > sequence_length + 1:
            too_long += 1
        else:
            episodes.append(rendered)
    read = Episodes(episodes, rows, untrained, too_long, sequence_length)
    if not episodes:
        raise InputError(f"nothing to train on in {', '.join(map(str, paths))}: {read}")
    return read


def read_messages(paths: Sequence[str | Path]) -> Iterator[tuple[str, list[Message]]]:
    """(`file:line`, messages) of every row; raises InputError for a malformed one."""
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path} is not a file; give a .jsonl file with `messages` in each row")
        for place, row in json_rows(path):
            yield place, _messages(row, place)


def _messages(row: dict[str, Any], place: str) -> list[Message]:
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        keys = ", ".join(sorted(row)[:5]) or "no keys"
        raise InputError(f"{place} has {keys}; expected `messages`, or `prompt` and `completion`")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: `messages` must be a list with at least one message; repair or remove the row")
    return [_message(message, f"{place}: message {i}") for i, message in enumerate(messages, 1)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{place} is {type(message).__name__}, expected an object with `role` and `content`")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            got = f"of type {type(message[key]).__name__}" if key in message else "missing"
            raise InputError(f"{place}: `{key}` is {got}, expected a string; repair or remove the row")
        check_unicode(message[key], f"{place}: `{key}`")
    return Message(role=message["role"], content=message["content"])


def check_mask(
    rendered: Rendered, messages: Sequence[Message], tokenizer: Tokenizer, template: Template, place: str
) -> None:
    """Assert that exactly the assistant's content and its end token train.

    Works from the ids alone, not from how they were rendered, so that a fault of
    the renderer shows.

    Raises:
        InputError: with `place`, if the mask could not be proved, mask and ids differ in
            length, or a trained run is not a message of the trained role followed by the
            end token.
    """
    if rendered.unproved:
        raise InputError(f"{place}: nothing of it can be trained: {rendered.unproved}")
    if len(rendered.mask) != len(rendered.ids):
        raise InputError(f"{place}: loss mask has {len(rendered.mask)} entries for {len(rendered.ids)} tokens")
    role, end = template.trained_role, tokenizer.special(template.end)
    runs = trained_runs(rendered)
    contents = [template.said(message) for message in messages if message["role"] == role]
    if len(runs) != len(contents):
        raise InputError(f"{place}: {len(runs)} trained runs of tokens for {len(contents)} {role} messages")
    for i, (run, content) in enumerate(zip(runs, contents, strict=True), 1):
        where = f"{place}: {role} message {i}"
        if run[-1] != end.id:
            raise InputError(f"{where}: the last trained token is {tokenizer.token_name(run[-1])}, expected {end.text}")
        if tokenizer.decode(run[:-1]) != content:
            raise InputError(f"{where}: the trained tokens are not its content")


def trained_runs(rendered: Rendered) -> list[list[int]]:
    """The ids of each maximal run of tokens with mask 1."""
    edges = np.flatnonzero(np.diff([0, *rendered.mask, 0]))
    return [rendered.ids[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def describe_episode(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(printable token, whether it trains) for each token, for display."""
    return [(tokenizer.token_name(id), bool(trains)) for id, trains in zip(rendered.ids, rendered.mask, strict=True)]
