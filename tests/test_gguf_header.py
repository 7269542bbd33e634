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
from hostile_gguf import ARRAY, STRING, U32, a_file, an_array, entry, tensor, text

from jaxgpt.errors import InputError
from jaxgpt.formats import gguf_header

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


PLACE = "0000000"


def numbered(declaration: bytes, count: int) -> bytes:
    """So many of it, each with its number where it has PLACE; at once, for a loop takes longer than the test."""
    rows = np.tile(np.frombuffer(declaration, np.uint8), (count, 1))
    at = declaration.index(PLACE.encode())
    rows[:, at : at + len(PLACE)] = np.arange(count)[:, None] // 10 ** np.arange(len(PLACE))[::-1] % 10 + ord("0")
    return rows.tobytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["texts", "entries", "tensors"])
def test_a_large_file_of_nothing_but_declarations_costs_little(tmp_path: Path, kind: str):
    path = tmp_path / "bomb.gguf"
    if kind == "texts":
        content = a_file((entry("k", ARRAY, an_array(STRING, 8_000_000, bytes(64_000_000))),))
    elif kind == "entries":
        content = a_file((numbered(entry(PLACE, 7, b"\0"), 2_000_000),), counts=(0, 2_000_000))
    else:
        content = a_file((), (numbered(tensor(PLACE, (0,)), 1_000_000),), counts=(1_000_000, 0))
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
