"""Hostile files, each through the command: one line, exit code 2, nothing written, nothing opened outside, soon."""

import dataclasses
import gc
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_vocabularies as small
from conftest import CONFIGS, random_params
from hostile_files import BOMBS, CATALOGUE, Hostile
from test_hf_format import a_checkpoint, a_folder

from jaxgpt import cli
from jaxgpt.formats import hf

pytestmark = pytest.mark.slow

SECONDS = 5.0
OURS = tuple(map(str, {Path(cli.__file__).parents[1], *map(Path, (sys.prefix, sys.base_prefix))}))
SYSTEM = ("/proc/", "/dev/", "/sys/", "/usr/")


class Opened:
    """Files that Python opens while it listens; a hook cannot be taken off again."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and self.paths is not None and isinstance(arguments[0], str | bytes):
            path = arguments[0]
            self.paths.append(path if isinstance(path, str) else path.decode())

    @contextmanager
    def listening(self) -> Generator[list[str]]:
        self.paths = found = []
        try:
            yield found
        finally:
            self.paths = None


OPENED = Opened()


def bases(place: Path) -> Path:
    """Valid folders by the name of their base."""
    for name in ("gpt2", "llama"):
        a_folder(place / name, name)
    wide = dataclasses.replace(CONFIGS["llama"], vocab_size=768, num_hidden_layers=1)
    hf.write(a_checkpoint("llama", config=wide, params=random_params(wide)), place / "wide")
    small.as_json(place / "wide", "gpt-2")
    (place / "nothing").mkdir()
    return place


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases(tmp_path_factory.mktemp("bases"))


def words_of(case: Hostile, valid: Path, place: Path) -> list[str]:
    """The command line, once its file lies below `place`."""
    folder = place / "given"
    shutil.copytree(valid / case.base, folder)
    case.write(folder)
    out = [str(place / "out")] if case.verb == "import" else []
    return [case.verb, str(folder / case.given), *out]


@pytest.mark.parametrize("base", ["gpt2", "llama", "wide"])
def test_what_the_catalogue_begins_from_is_imported(base: str, valid: Path, tmp_path: Path):
    """The control: whatever is refused below is refused for its lie."""
    assert cli.main(["import", str(valid / base), str(tmp_path / "out")]) == 0


def test_the_hook_hears_of_a_file_outside(tmp_path: Path):
    with OPENED.listening() as opened:
        Path("/etc/hosts").exists()
        (tmp_path / "x").write_text("x")
    assert str(tmp_path / "x") in opened


def test_the_catalogue_is_large_and_its_lies_are_different():
    assert len(CATALOGUE) >= 100
    assert len({id(case.write) for case in CATALOGUE.values()}) == len(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_hostile_file_is_refused(name: str, valid: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    case = CATALOGUE[name]
    words = words_of(case, valid, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with OPENED.listening() as opened, soon():
        code = cli.main(words)
    told = capfd.readouterr()
    assert code == 2, told
    assert told.out == ""
    assert told.err.startswith("jaxgpt: ")
    assert told.err.count("\n") == 1
    assert len(told.err) < 700
    assert re.search(case.words, told.err), told.err
    assert sorted(tmp_path.rglob("*")) == before
    assert [path for path in opened if not allowed(path, tmp_path / "given")] == []


@contextmanager
def soon() -> Generator[None]:
    """Five seconds, of which two processes may each be given half on a machine that is busy with other tests."""
    # What a million objects cost the collector must not depend on what other tests have left in memory.
    gc.freeze()
    wall, cpu = time.monotonic(), cpu_seconds()
    try:
        yield
    finally:
        gc.unfreeze()
    assert cpu_seconds() - cpu < SECONDS / 2
    assert time.monotonic() - wall < 2 * SECONDS


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(found.ru_utime + found.ru_stime for found in both)


def allowed(path: str, folder: Path) -> bool:
    """In the folder, or a part of Python, of its packages or of the system's libraries."""
    real = Path(path).resolve() if not path.startswith("/proc/") else Path(path)
    return real.is_relative_to(folder) or str(real).startswith((*OURS, *SYSTEM))


CHILD = """
import json, re, sys
from pathlib import Path
from jaxgpt import cli
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
first, *others = json.loads(sys.stdin.read())
cli.main(first)
for words in others:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    cli.main(words)
    print("grown", peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_no_more_memory_than_twice_their_size_and_500_mib(valid: Path, tmp_path: Path):
    commands = [["import", str(valid / "wide"), str(tmp_path / "out")]]
    limits = list[int]()
    for number, name in enumerate(BOMBS):
        commands.append(words_of(CATALOGUE[name], valid, tmp_path / str(number)))
        size = sum(path.lstat().st_size for path in (tmp_path / str(number)).rglob("*"))
        limits.append(2 * size + 500 * 2**20)
    run = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(commands), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown = [int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("grown")]
    assert len(grown) == len(BOMBS)
    rows = zip(BOMBS, grown, limits, strict=True)
    assert {name: size >> 20 for name, size, limit in rows if size > limit} == {}
