"""GPT-2's alphabet: each byte as one printable character, in which vocabularies of byte-level BPE are spelled.

Printable bytes of Latin-1 stand for themselves, the other 68 for the characters from
U+0100 on, in their order (`bytes_to_unicode` of OpenAI's GPT-2).
"""

_ITSELF = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_MOVED = [byte for byte in range(256) if byte not in _ITSELF]
CHARACTERS = [chr(byte) if byte in _ITSELF else chr(256 + _MOVED.index(byte)) for byte in range(256)]
"""Character of each byte."""
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}
"""Byte of each character."""


def spelled(token: bytes) -> str:
    """A token's bytes as vocabularies write them: `b" the"` is `Ġthe`."""
    return "".join(map(CHARACTERS.__getitem__, token))


def unspelled(text: str) -> bytes | None:
    """Inverse of `spelled`; None for text with a character outside the alphabet."""
    try:
        return bytes(map(BYTES.__getitem__, text))
    except KeyError:
        return None
