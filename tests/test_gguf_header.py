"""GGUF headers that lie: one line, bounded time and memory, whatever the file declares."""

import random
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxgpt import cli
from jaxgpt.errors import InputError
from jaxgpt.formats import gguf_header

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


GOOD = a_file(
    (
        entry("general.architecture", STRING, text("llama")),
        entry("a.count", U32, struct.pack("<I", 7)),
        entry("a.tokens", ARRAY, an_array(STRING, 3, text("a") + text("bc") + text(b"\xff"))),
        entry("a.scores", ARRAY, an_array(6, 20, struct.pack("<20f", *range(20)))),
    ),
    (tensor("t", (4, 2)), tensor("u", (32,), 8, 32)),
    data=32 + 64,
)


def test_a_whole_header_is_read(tmp_path: Path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    found = gguf_header.read(path)
    assert found.metadata["a.count"] == 7
    assert found.metadata["a.tokens"] == gguf_header.Array(3, ["a", "bc", "\ufffd"])
    assert found.metadata["a.scores"].first == list(range(8))
    assert [(t.name, t.shape, t.dtype, t.size) for t in found.tensors] == [
        ("t", (2, 4), "F32", 32),
        ("u", (32,), "Q8_0", 34),
    ]
    theirs = gguf.GGUFReader(path)
    assert [t.data_offset for t in theirs.tensors] == [t.start for t in found.tensors]


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


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], lie: str):
    path = tmp_path / "bad.gguf"
    content, message = LIES[lie]
    path.write_bytes(content)
    assert cli.main(["inspect", str(path), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("jaxgpt: bad.gguf ")
    assert message in captured.err


def test_any_cut_and_any_flipped_byte_is_read_or_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    rng = random.Random(0)
    for number in range(500):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(data[: rng.randrange(len(data))] if number % 3 == 0 else data)
        message = ""
        try:
            found = gguf_header.read(path)
            assert all(t.start + t.size <= len(data) for t in found.tensors)
        except InputError as error:
            message = str(error)
        assert message.isprintable()


CHILD = """
import re, sys, time
from pathlib import Path
from jaxgpt.errors import InputError
from jaxgpt.formats import gguf_header
import gguf.constants
begin = time.process_time()
try:
    gguf_header.read(Path(sys.argv[1]))
    print("read")
except InputError as error:
    print("refused", error)
print(time.process_time() - begin, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["texts", "entries", "tensors"])
def test_a_large_file_of_nothing_but_declarations_costs_little(tmp_path: Path, kind: str):
    path = tmp_path / "bomb.gguf"
    if kind == "texts":
        content = a_file((entry("k", ARRAY, an_array(STRING, 8_000_000, bytes(64_000_000))),))
    elif kind == "entries":
        content = a_file(tuple(entry(f"{n}", 7, b"\0") for n in range(2_000_000)))
    else:
        content = a_file((), tuple(tensor(f"{n}", (0,)) for n in range(1_000_000)))
    path.write_bytes(content)
    run = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    verdict, numbers = run.stdout.splitlines()
    seconds, memory = map(float, numbers.split())
    assert verdict.startswith("refused")
    assert seconds < 5
    assert memory * 1024 < 2 * len(content) + 500 * 2**20


def test_what_the_largest_vocabularies_hold_is_read(tmp_path: Path):
    path = tmp_path / "large.gguf"
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token {n}" for n in range(300_000)])
    writer.add_tensor("t", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    found = gguf_header.read(path)
    assert found.metadata["tokenizer.ggml.tokens"].length == 300_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5
