"""Saves that fail, signals and kills that come in the middle cost a run nothing.

Each run is the command `jaxgpt pretrain`. One that nobody disturbed says what the others must come to.
"""

import errno
import gc
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare
from reliability_kills import POINTS, differences, logged, lost
from reliability_run import encode_text, words

from jaxgpt import checkpoint, cli, gates, preflight, run_log, training_loop
from jaxgpt.data.shards import TokenShards
from jaxgpt.run_log import RunLog

pytestmark = pytest.mark.slow

STEPS = 6
RUN = ("--steps", STEPS, "--save-every", 2, "--eval-every", 4)
PATIENCE = 30
"""Seconds that a thread waits for another before the test fails."""


@pytest.fixture(scope="module", autouse=True)
def _bare_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def _a_signal_that_no_run_takes_is_a_failure() -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise AssertionError("nobody took the signal")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_text(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; what writes step 2 was held up until step 3 was taken."""
    out, taken, write, seal = tmp_path_factory.mktemp("runs") / "run", threading.Event(), RunLog.write, checkpoint._seal

    def noted(self: RunLog, event: str, step: int, **values: Any) -> None:
        write(self, event, step, **values)
        if (event, step) == ("train", 3):
            taken.set()

    def held(*arguments: Any) -> None:
        assert taken.wait(PATIENCE), "training waits for the save"
        seal(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", noted)
        patch.setattr(checkpoint, "_seal", held)
        assert begin(data, out) == 0
    return out


def begin(data: Path, out: Path) -> int:
    return cli.main(words(out, data, *RUN))


def go_on(out: Path) -> int:
    return cli.main(words(out, resume=True))


def goes_on_as(undisturbed: Path, out: Path) -> None:
    """Resumed, the run ends as one that nobody disturbed: same bits, each step in its log once."""
    assert go_on(out) == 0
    assert differences(out, undisturbed) == []
    assert [step for step, _, _ in logged(out, "train")] == [*range(1, STEPS + 1)]


def saved(out: Path) -> list[int]:
    """Steps that the log calls saved."""
    return [record["step"] for record in run_log.read(out) if record["event"] == "save"]


def full(steps: set[int], patch: pytest.MonkeyPatch) -> None:
    """The disk is full when one of these steps is saved."""
    plain = checkpoint._require_space

    def require_space(directory: Path, contents: Any) -> None:
        if int(contents.train["1"]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(directory, contents)

    patch.setattr(checkpoint, "_require_space", require_space)


def no_file_is_long(step: int, patch: pytest.MonkeyPatch) -> None:
    """While this step is saved, the system refuses what a file has beyond 2,000 bytes, as a quota does."""
    begin_, not_saved, limits = checkpoint._begin, checkpoint._not_saved, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(directory: Path, contents: Any) -> None:
        begin_(directory, contents)
        if int(contents.train["1"]) == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    def freed(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return not_saved(*arguments)

    patch.setattr(checkpoint, "_begin", limited)
    patch.setattr(checkpoint, "_not_saved", freed)


# -- Saves -----------------------------------------------------------------------------


def test_every_step_logs_a_checksum_of_its_own_batch(undisturbed: Path):
    batches = [batch for _, _, batch in logged(undisturbed, "train")]
    assert len(set(batches)) == STEPS
    assert all(len(batch) == 16 and int(batch, 16) for batch in batches)


def test_training_goes_on_while_a_step_is_being_saved(undisturbed: Path):
    assert saved(undisturbed) == [2, 4, 6]
    events = [(record["event"], record["step"]) for record in run_log.read(undisturbed)]
    assert events.index(("train", 3)) < events.index(("save", 2))


def test_a_save_that_fails_is_told_at_the_next_step_and_costs_nothing(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    full({2}, monkeypatch)
    assert begin(data, tmp_path / "run") == 0
    assert differences(tmp_path / "run", undisturbed) == []
    assert checkpoint.steps(tmp_path / "run") == [4, 6]
    told = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert len(told) == 1
    assert told[0].startswith("step 2 was not saved: disk full (need ")
    records = run_log.read(tmp_path / "run")
    at = next(i for i, record in enumerate(records) if record["event"] == "save failed")
    assert (records[at]["step"], records[at]["reason"]) == (2, told[0])
    assert (records[at - 1]["event"], records[at - 1]["step"]) == ("train", 3)
    assert saved(tmp_path / "run") == [4, 6]


def test_a_last_save_that_fails_is_an_error_and_resume_goes_on_from_the_last_good_step(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        no_file_is_long(4, patch)
        full({6}, patch)
        assert begin(data, out) == 2
    gc.collect()  # with what a library leaves behind it may warn
    *lines, last = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if line.startswith("step 4 was not saved: ")]
    assert "File too large" in told
    assert told.endswith("; last good step 2")
    assert last.startswith("jaxgpt: step 6 was not saved: disk full (need ")
    assert last.endswith(" free); last good step 2")
    assert checkpoint.load(out, train=True).step == 2
    goes_on_as(undisturbed, out)


@contextmanager
def bound_by_permissions() -> Generator[None]:
    """Root may write where the mode of a folder says that nobody may, unless it gives that right up."""
    if os.geteuid():
        yield
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capabilities of this thread
    assert libc.capget(head, sets) == 0
    effective, override = sets[0], 1 << 1
    sets[0] = effective & ~override
    assert libc.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(head, sets) == 0


@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_folder_is_said_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with bound_by_permissions():
        assert begin(data, folder if exists else folder / "run") == 2
    text = capsys.readouterr().err
    what = folder / "log.jsonl" if exists else folder / "run"
    assert text == f"jaxgpt: {what}: Permission denied; check that it exists and may be used\n"
    assert list(folder.iterdir()) == []


def test_resume_passes_over_a_damaged_step_and_says_so(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    damaged = bytearray((out / "step-00000006/train.json").read_bytes())
    damaged[20] ^= 1
    (out / "step-00000006/train.json").write_bytes(damaged)
    goes_on_as(undisturbed, out)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "checkpoint step 6: train.json fails SHA-256; using verified step 4"
    assert told[1] == "resuming at step 4"
    assert (out / "step-00000006.damaged").is_dir()


# -- Kills -----------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import reliability_kills as k
k.be_the_run(k.Kill({point!r}, {nth}), {arguments!r}, Path({errors!r}), 0)
"""


@pytest.mark.parametrize(
    "point", [p if p == "before the rename" else pytest.param(p, marks=pytest.mark.exhaustive) for p in POINTS]
)
def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_happened(
    data: Path, undisturbed: Path, tmp_path: Path, point: str
):
    out, errors = tmp_path / "run", tmp_path / "errors"
    scripts = Path(__file__).parents[2] / "scripts"
    # In the save of step 4; three files of each save have that name. The save of step 6 is the first that deletes.
    nth = {"files being forced to disk": 4, "during deletion": 1}.get(point, 2)
    arguments = words(out, data, *RUN)
    code = CHILD.format(scripts=str(scripts), point=point, nth=nth, arguments=arguments, errors=str(errors))
    status = subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode
    assert status == -signal.SIGKILL, errors.read_text()
    assert lost(out) == []
    assert saved(out) == ([2, 4] if point == "during deletion" else [2])
    goes_on_as(undisturbed, out)
    assert "save failed" not in {record["event"] for record in run_log.read(out)}


# -- Signals ---------------------------------------------------------------------------


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_anything_is_compiled_ends_the_command_with_nothing_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(TokenShards, "verify", lambda _: terminate())
    assert begin(data, tmp_path / "run") == 130
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_step_is_compiled_saves_step_0_and_the_gates_are_made_up_for(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out, gated, check = tmp_path / "run", list[int](), gates.check_fresh
    monkeypatch.setattr(gates, "check_fresh", lambda *arguments: gated.append(0) or check(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "step_bytes", lambda *_: terminate() or 1)
        assert begin(data, out) == 130
    assert "SIGTERM received; saving step 0" in capsys.readouterr().err.splitlines()
    assert (checkpoint.steps(out), gated) == ([0], [])
    goes_on_as(undisturbed, out)
    assert gated == [0]


def test_a_signal_while_a_step_is_saved_waits_for_it_and_saves_the_newest(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, saving, said = tmp_path / "run", threading.Event(), threading.Event()
    write, say, seal = RunLog.write, RunLog.say, checkpoint._seal

    def signalled(self: RunLog, event: str, step: int, **values: Any) -> None:
        write(self, event, step, **values)
        if (event, step) == ("train", 3):
            assert saving.wait(PATIENCE), "step 2 is being saved"
            terminate()

    def noted(self: RunLog, text: str) -> None:
        say(self, text)
        if text == "SIGTERM received; saving step 3":
            said.set()

    def held(*arguments: Any) -> None:
        saving.set()
        assert said.wait(PATIENCE), "the signal is taken while step 2 is being saved"
        seal(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", signalled)
        patch.setattr(RunLog, "say", noted)
        patch.setattr(checkpoint, "_seal", held)
        assert begin(data, out) == 130
    assert checkpoint.steps(out) == [2, 3]
    assert lost(out) == []
    goes_on_as(undisturbed, out)


@pytest.mark.parametrize("step", [0, pytest.param(4, marks=pytest.mark.exhaustive), 6])
def test_a_signal_in_a_validation_ends_the_run_at_once_and_resume_makes_up_for_it(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    plain, seen = training_loop.evaluate, []

    def evaluate(config: Any, params: Any, batches: Any, dtype: str, layout: Any) -> float:
        seen.append(0)
        here = len(seen) == 1 + [0, 4, 6].index(step)
        if here:
            terminate()
        loss = plain(config, params, batches, dtype, layout)
        assert not here or loss != loss, "batches were measured after the signal"
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "evaluate", evaluate)
        assert begin(data, tmp_path / "run") == 130
    assert checkpoint.steps(tmp_path / "run")[-1] == step
    goes_on_as(undisturbed, tmp_path / "run")
