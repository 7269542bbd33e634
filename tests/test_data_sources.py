import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from jaxgpt.data import sources
from jaxgpt.data.sources import Document, File, Skipped, documents, files, read
from jaxgpt.errors import InputError


def message(source: str | Path) -> str:
    with pytest.raises(InputError) as error:
        list(documents(source))
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_the_data_package_imports_no_jax():
    code = "import sys, jaxgpt.data.encode, jaxgpt.data.batches, jaxgpt.data.instructions; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_standard_library_is_sorted_python_without_tests_and_site_packages():
    names = [file.name for file in files("stdlib")]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__"}
    folder = Path(sysconfig.get_paths()["stdlib"])
    ast = next(file for file in files("stdlib") if file.name == "ast.py")
    assert list(read(ast)) == [Document("ast.py", (folder / "ast.py").read_text("utf-8"))]


def test_a_folder_gives_its_text_files_in_order_of_relative_path(tmp_path: Path):
    for name, text in {"b.py": "B", "a/z.txt": "Z\r\n", ".git/config": "no", "a/.hidden": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert [(d.name, d.text) for d in documents(tmp_path)] == [("a/z.txt", "Z\r\n"), ("b.py", "B")]


def test_a_file_in_a_folder_that_is_no_text_is_skipped_with_its_reason(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"ok\xff")
    (tmp_path / "b.bin").write_bytes(b"ok\0")
    (tmp_path / "c.txt").write_bytes(b"")
    items = [item for file in files(tmp_path) for item in read(file)]
    assert items == [
        Skipped("a.bin", "0xff at byte 2"),
        Skipped("b.bin", "NUL at byte 2"),
        Skipped("c.txt", "empty"),
    ]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert message(tmp_path / "pipe").startswith(
        f"{tmp_path}/pipe is a pipe or device, and text is read more than once; give a folder, a text or .jsonl file"
    )
    assert message(tmp_path / "none").startswith(f"{tmp_path}/none does not exist; give a folder")


def test_a_file_named_by_the_user_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"ok\xff")
    assert message(tmp_path / "a.txt") == f"{tmp_path}/a.txt is not UTF-8 text (0xff at byte 2); convert it first"


def test_each_row_of_jsonl_is_a_document_named_by_its_line(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\nb", "id": 7}\n\n{"text": "c"}')
    assert [(d.name, d.text) for d in documents(path)] == [("x.jsonl:1", "a\nb"), ("x.jsonl:3", "c")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'{"text": "a', "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'["text"]', "is a JSON list, expected an object"),
        (b"7", "is a JSON int, expected an object"),
        (b'{"text": 7}', "has `text` of type int, expected a string"),
        (b'{"text": null}', "has `text` of type NoneType"),
        (b'{"txt": "a"}', "has no key `text`"),
        (b'{"messages": []}', "chats are for `jaxgpt sft`"),
        (b'{"text": "abc\xff"}', "is not UTF-8 (0xff at byte 13)"),
        (b'{"text": "abc\\ud800"}', "is not valid Unicode at character 3 (U+D800)"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path: Path, row: bytes, expected: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + row + b"\n")
    text = message(path)
    assert text.startswith(f"{path}:2")
    assert expected in text


def test_a_huge_line_is_refused_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MAX_LINE", 2**20)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "a" * 2**20}))
    assert message(path) == f"{path}:1 is longer than 1 MiB; JSONL has one row a line"


def test_a_missing_source_is_refused(tmp_path: Path):
    assert "does not exist" in message(tmp_path / "none")
    assert "holds no files" in message(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / name).write_text("text")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert message(tmp_path).startswith(f"{tmp_path}/{name} cannot be read (Permission denied)")


def test_a_folder_named_stdlib_is_reached_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert files("./stdlib") == [File(Path("stdlib/a.txt"), "a.txt")]
