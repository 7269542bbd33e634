"""A script: tries a foreign `tokenizer.json` in a process of its own, bounded in time and memory.

The package's regex engine backtracks, its normalizers may blow a text up, and neither
can be interrupted from Python: what does not come through here is not loaded. It is
run as a file, by `bounded`, and imports the package and the standard library only.
"""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

CPU_SECONDS = 3
WALL_SECONDS = 20
"""Only a machine busy with other things needs more than CPU_SECONDS; nothing in a tokenizer can sleep."""
SPARE_MEMORY = 500 << 20
LENGTHS = (30, 3000)
"""Repetitions: exponential patterns show at the first, polynomial ones at the second."""


class _File:
    """One of the same bytes is the same file."""

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256(path.read_bytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _File) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class _Refused(Exception):
    """With the reason; a cache forgets calls that raise, and a busy machine is none to remember."""


def bounded(path: Path) -> str:
    """What is wrong with a tokenizer.json, in words; empty if it loads and encodes within the bounds.

    Those that did once are not tried again by this process: they are known by their bytes.
    """
    try:
        _let_through(_File(path))
    except _Refused as refused:
        return str(refused)
    return ""


@functools.lru_cache(maxsize=1000)
def _let_through(file: _File) -> None:
    problem = _tried(file.path)
    if problem:
        raise _Refused(problem)


def _tried(path: Path) -> str:
    command = [sys.executable, "-P", __file__, str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not load and encode a few lines in {WALL_SECONDS} s"
    if run.returncode == 0:
        return ""
    said = run.stdout.strip().splitlines()
    if said and run.returncode == 3:
        return said[-1]
    if run.returncode < 0 and "memory" not in run.stderr:
        return f"it did not load and encode a few lines in {CPU_SECONDS} s of computing"
    return "it needs far more memory than its size"


def _limit(size: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        limit = used + 2 * size + SPARE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _texts(sections: str) -> list[str]:
    """Runs that patterns stumble over: of each kind of character, and of what the patterns name themselves."""
    named = sorted({c for c in sections if c.isprintable()})[:80]
    units = [*dict.fromkeys(["a", "A", "1", " ", "\n", "\t", "!", "é", "中", "\u0301", "🙂", *named])]
    pairs = [
        "".join(pair) for pair in itertools.product([c for c in units if c.isalnum() or c.isspace()][:12], repeat=2)
    ]
    # The engine does not even begin where a character that must follow is nowhere in the text.
    ends = ("", "\0", "\0" + "".join(units))
    return [unit * length + end for unit in units for length in LENGTHS for end in ends] + [
        pair * LENGTHS[0] + end for pair in pairs for end in ends[1:]
    ]


def main(path: Path) -> int:
    """Exit status 0, or 3 with the reason on standard output."""
    # One thread: others would each reserve memory for their stack.
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    import tokenizers

    _limit(path.stat().st_size)
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
        library.no_truncation()
        library.no_padding()
        parts = [part.__getstate__() for part in (library.normalizer, library.pre_tokenizer) if part is not None]
        for text in _texts(" ".join(str(json.loads(part)) for part in parts)):
            library.encode_batch_fast([text], add_special_tokens=False)
    except BaseException as error:
        print(" ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:200])
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
