"""GGUF files that lie, and what such files are made of."""

import struct

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def an_array(kind: int, length: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + items


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def a_file(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    counts: tuple[int, int] | None = None,
    data: int = 64,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    n_tensors, n_entries = (len(tensors), len(entries)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


HUGE = 2**62
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "another format": (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
    "nothing but the magic": (b"GGUF", "declares 4 bytes at byte 4, file is 4 bytes"),
    "old version": (a_file(version=1), "has GGUF version 1, expected 2 or 3"),
    "big-endian": (a_file(version=3 << 24), "is big-endian"),
    "count of tensors": (a_file(counts=(HUGE, 0)), "declares 4,611,686,018,427,387,904 tensors"),
    "count of entries": (a_file(counts=(0, HUGE)), "declares 4,611,686,018,427,387,904 metadata entries"),
    "more tensors than there are": (a_file((), (tensor("t", (4,)),), counts=(2, 0)), "has a name of 0 bytes"),
    "length of a key": (a_file((struct.pack("<Q", HUGE),)), "declares 4611686.0 TB at byte 32"),
    "length of a text": (a_file((entry("k", STRING, struct.pack("<Q", HUGE)),)), "declares 4611686.0 TB"),
    "a key that is not UTF-8": (a_file((entry(b"\xff\xfe", U32, bytes(4)),)), "which is not UTF-8"),
    "the same key twice": (a_file((entry("k", U32, bytes(4)),) * 2), "has metadata k twice"),
    "an unknown type of value": (a_file((entry("k", 99, bytes(4)),)), "has a value of type 99"),
    "length of an array of numbers": (a_file((entry("k", ARRAY, an_array(U32, HUGE)),)), "declares 18446744.1 TB"),
    "length of an array of booleans": (a_file((entry("k", ARRAY, an_array(7, HUGE)),)), "declares 4611686.0 TB"),
    "length of an array of texts": (a_file((entry("k", ARRAY, an_array(STRING, HUGE)),)), "texts, file is"),
    "an array of arrays": (
        a_file((entry("k", ARRAY, an_array(ARRAY, 1, an_array(U32, 0))),)),
        "llama.cpp does not read",
    ),
    "dimensions": (a_file((), (tensor("t", (1,) * 9),)), "gives t 9 dimensions"),
    "no dimensions": (a_file((), (tensor("t", ()),)), "gives t 0 dimensions"),
    "an unknown type": (a_file((), (tensor("t", (4,), 77),)), "gives t the unknown type 77"),
    "a size bomb": (a_file((), (tensor("t", (HUGE, HUGE)),)), "gives t "),
    "rows that are no blocks": (a_file((), (tensor("t", (33,), 8),)), "rows of 33, Q8_0 has blocks of 32"),
    "an offset outside": (a_file((), (tensor("t", (4,), 0, HUGE),)), "places tensor t elsewhere"),
    "overlapping tensors": (a_file((), (tensor("t", (4,)), tensor("u", (4,)))), "places tensor u elsewhere"),
    "the same tensor twice": (a_file((), (tensor("t", (8,)), tensor("t", (8,), 0, 32))), "has tensor t twice"),
    "cut short": (a_file((), (tensor("t", (400,)),)), "gives t 1.6 KB"),
    "alignment of zero": (a_file((entry("general.alignment", U32, bytes(4)),)), "has general.alignment 0"),
    "alignment of text": (a_file((entry("general.alignment", STRING, text("x")),)), "has general.alignment x"),
}
