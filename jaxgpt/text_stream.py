"""Ids to text while they arrive: never half a character, never part of a stop string."""

import codecs
from collections.abc import Iterable

from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer


class TextStream:
    """Text of a growing list of ids.

    What `push` and `finish` return, joined, is `decode(ids, skip_specials=True)` up
    to the first stop string. The first is the one completed first, and the longest
    of those completed at the same character; so the cut does not depend on where
    tokens begin and end.

    Attributes:
        stopped: the stop string that ended the text, None until then.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Iterable[str] = ()) -> None:
        """Raises InputError for an empty stop string."""
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        if "" in self._stop_strings:
            raise InputError("a stop string is empty and would stop every reply; remove it")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, id: int) -> str:
        """Text that is now certain: empty while a character or a stop string may be incomplete."""
        if id in self._tokenizer.special_ids:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """The rest: text held back, and U+FFFD for a character that never became whole."""
        released = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        self._held += text
        match = self._first_stop()
        if match is not None:
            start, self.stopped = match
            released, self._held = self._held[:start], ""
            return released
        split = len(self._held) - self._unsure()
        released, self._held = self._held[:split], self._held[split:]
        return released

    def _first_stop(self) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first."""
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        return min(matches)[1:] if matches else None

    def _unsure(self) -> int:
        """Length of the longest end of the held text that a stop string may begin with."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0
