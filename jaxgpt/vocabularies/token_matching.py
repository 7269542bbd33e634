"""Where whole tokens stand in a text, as the tokenizers package finds its added tokens.

Leftmost first, the longest first, never overlapping. A token may take the white space
beside it along (`<mask>` of many vocabularies), or count only as a word of its own.
The rules are those of `AddedVocabulary::find_matches` in tokenizers
(tokenizers/src/tokenizer/added_vocabulary.rs), which the tests compare.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping

from jaxgpt.vocabularies.kinds import SPACES, Edges

_PLAIN = Edges()


class TokenMatcher:
    """Finds some tokens in texts."""

    def __init__(self, ids: Mapping[str, int], edges: Mapping[str, Edges]) -> None:
        """Takes tokens by their string, and the edges of those that have any."""
        self._ids = dict(ids)
        self._edges = edges
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for token in ids:
            lengths[token[0]].add(len(token))
        # One regex of all tokens would try a hundred thousand of them at every character.
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, lengths))}]" if lengths else r"(?!)")

    def cut(self, text: str, silent: Container[str]) -> Iterator[str | int]:
        """The text as ids of tokens and the texts between them, none empty.

        Tokens in `silent` are text: they are matched, so that no other token begins within them, and left.
        """
        begin = 0
        for start, token in self._found(text):
            stop = start + len(token)
            edges = self._edges.get(token, _PLAIN)
            if token in silent or (edges.single_word and _within_word(text, start, stop)):
                continue
            if edges.lstrip:
                start = begin + len(text[begin:start].rstrip(SPACES))
            if edges.rstrip:
                stop = len(text) - len(text[stop:].lstrip(SPACES))
            if start > begin:
                yield text[begin:start]
            yield self._ids[token]
            begin = stop
        if begin < len(text):
            yield text[begin:]

    def _found(self, text: str) -> Iterator[tuple[int, str]]:
        """Where tokens begin, and which: the leftmost first, the longest first, so that no prefix wins."""
        stop = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < stop:
                continue
            for length in self._lengths[match[0]]:
                token = text[start : start + length]
                if token in self._ids:
                    yield start, token
                    stop = start + len(token)
                    break


def _within_word(text: str, start: int, stop: int) -> bool:
    return (start > 0 and is_word(text[start - 1])) or (stop < len(text) and is_word(text[stop]))


def is_word(character: str) -> bool:
    r"""Whether `\w` of Rust's regex matches it (Unicode's UTS 18, annex C); Python's leaves marks out."""
    category = unicodedata.category(character)
    if category[0] in "LM" or category in ("Nd", "Nl", "Pc"):
        return True
    # Join_Control, and the letters in circles and squares, which are Alphabetic but no letters.
    code = ord(character)
    circled = 0x24B6 <= code <= 0x24E9 or 0x1F130 <= code <= 0x1F149 or 0x1F150 <= code <= 0x1F169
    return circled or 0x1F170 <= code <= 0x1F189 or code in (0x200C, 0x200D)
