"""Where the oracle writes: devices, pipes and links stay what they are, and nothing is left half-written."""

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from jaxgpt.errors import InputError
from oracle import output_file


def test_a_pipe_is_written_through_and_stays_a_pipe(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    output_file.require("--html", pipe)
    output_file.write_text(pipe, "page\n")
    reader.join(10)
    assert got == ["page\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool):
    (tmp_path / "place").mkdir()
    target, link = tmp_path / "place" / "target", tmp_path / "link"
    if exists:
        target.write_text("before")
    link.symlink_to(target)
    output_file.require("--json", link)
    output_file.write_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_stream_that_is_open_already_is_not_replaced(tmp_path: Path):
    with (tmp_path / "out").open("a+") as stream:
        output_file.write_text(Path(f"/proc/self/fd/{stream.fileno()}"), "text")
        stream.seek(0)
        assert stream.read() == "text"


def test_names_that_cannot_be_are_refused_beforehand(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("no/such")
    for name, message in {
        "a" * 256: r"^--html: .{1,300}: File name too long; name another$",
        "a\0b": "cannot be a file",
        "loop": "cannot be a file: Too many levels of symbolic links",
        "no/file": "no does not exist; create it first",
        "dangling": "no does not exist; create it first",
        ".": "is a folder; name a file in it",
    }.items():
        with pytest.raises(InputError, match=message):
            output_file.require("--html", tmp_path / name)


def test_the_longest_name_can_be_written(tmp_path: Path):
    output_file.require("--html", tmp_path / ("a" * 255))
    output_file.write_text(tmp_path / ("a" * 255), "page")
    assert (tmp_path / ("a" * 255)).read_text() == "page"


@pytest.mark.parametrize("before", [None, "before\n"])
def test_what_cannot_be_appended_leaves_the_file_as_it_was(tmp_path: Path, before: str | None):
    file = tmp_path / "summary.md"
    if before is not None:
        file.write_text(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large; name another file"):
            output_file.append(file, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (file.read_text() if file.exists() else None) == before
    output_file.append(file, "after\n")
    assert file.read_text() == (before or "") + "after\n"


def test_no_result_takes_the_place_of_another_or_of_what_it_is_made_from(tmp_path: Path):
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    output_file.require_distinct({"--html": page, "--json": tmp_path / "report.json"}, {"A": tmp_path / "a.trace"})
    with pytest.raises(InputError, match=r"^--json: .*link\.html is the file of --html too; name another$"):
        output_file.require_distinct({"--html": page, "--json": link}, {})
    with pytest.raises(InputError, match=r"^--html: .*page\.html is the file of the report too; name another$"):
        output_file.require_distinct({"--html": tmp_path / "." / "page.html"}, {"the report": page})
    stdout = Path("/dev/stdout")
    output_file.require_distinct({"--html": stdout, "--json": stdout}, {"A": stdout})
