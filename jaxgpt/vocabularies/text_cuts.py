"""Where a text may be cut so that the ids of its parts, joined, are the ids of the whole."""

import re
from collections.abc import Iterator

# Pre-tokenizers (GPT-2's, Llama's, Qwen's, characters) always separate here.
_SAFE_CUT = re.compile(r"(?<=\S)(?= \S)")


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at least `size` characters whose ids, joined, are the ids of `text`."""
    start = 0
    while match := _SAFE_CUT.search(text, start + size):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]
