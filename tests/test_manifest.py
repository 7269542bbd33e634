"""Manifests: whatever happens to a file of the folder, the answer names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxgpt import manifest
from jaxgpt.errors import InputError

FILES = {"a.txt": b"hello", "sub/b.bin": bytes(range(200)), "sub/deep/c": b"", "train/d": b"state"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    manifest.seal(tmp_path / "f")
    return tmp_path / "f"


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        manifest.verify(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """A manifest that agrees with itself, as a hostile author would write it."""
    listed = json.loads((folder / manifest.MANIFEST).read_text())["files"]
    change(listed)
    (folder / manifest.MANIFEST).write_text(manifest.spelled(listed))


def test_a_sealed_folder_verifies_and_gives_sizes(folder: Path):
    assert manifest.verify(folder) == {name: len(data) for name, data in FILES.items()}


def test_every_flipped_bit_of_every_file_is_found_and_named(folder: Path):
    for name in FILES:
        data = (folder / name).read_bytes()
        for bit in range(0, len(data) * 8, 37):
            (folder / name).write_bytes(flipped(data, bit))
            assert refused(folder) == f"{name} fails SHA-256"
        (folder / name).write_bytes(data)
    manifest.verify(folder)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_blamed_on_the_manifest(folder: Path):
    path = folder / manifest.MANIFEST
    data = path.read_bytes()
    for byte in range(len(data)):
        path.write_bytes(flipped(data, byte * 8 + byte % 7))
        assert refused(folder).startswith("manifest.json "), byte


def test_truncated_missing_and_foreign_files_are_named(folder: Path):
    (folder / "sub/b.bin").write_bytes(bytes(199))
    assert refused(folder) == "sub/b.bin has 199 bytes, its manifest says 200"
    (folder / "sub/b.bin").unlink()
    assert refused(folder) == "sub/b.bin missing, of 4 files in manifest.json"
    (folder / "sub/b.bin").write_bytes(FILES["sub/b.bin"])
    (folder / "sub/new").write_bytes(b"x")
    assert refused(folder) == "sub/new not in manifest.json; remove what does not belong to the checkpoint"


def test_two_files_swapped_are_found(folder: Path):
    (folder / "a.txt").write_bytes(b"state")
    (folder / "train/d").write_bytes(b"hello")
    assert refused(folder) == "a.txt fails SHA-256"


def test_a_folder_may_be_left_unhashed_but_not_unlisted(folder: Path):
    (folder / "train/d").write_bytes(b"STATE")
    manifest.verify(folder, unhashed=("train",))
    (folder / "train/d").write_bytes(b"longer")
    with pytest.raises(InputError, match="train/d has 6 bytes"):
        manifest.verify(folder, unhashed=("train",))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../../x", "sub//b", "./a", "sub\\b", ""])
def test_a_name_that_leads_outside_is_refused(folder: Path, name: str):
    rewrite(folder, lambda listed: listed.update({name: {"size": 1, "sha256": "0"}}))
    assert refused(folder) == f"manifest.json names {name}, outside the checkpoint folder; refused"


def test_links_and_devices_are_refused(folder: Path, tmp_path: Path):
    (tmp_path / "copy").write_bytes(FILES["a.txt"])
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "copy")
    assert refused(folder) == "a.txt is a link or device, not a file; refused"
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    assert refused(folder) == "a.txt is a link or device, not a file; refused"


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path):
    (folder / "sub").rename(tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert refused(folder) == "sub is a link or device, not a file; refused"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"version": 1}', "[" * 100_000, '{"version": 1, "files": 3}']
)
def test_a_manifest_that_jaxgpt_did_not_write_is_damaged(folder: Path, text: str):
    (folder / manifest.MANIFEST).write_text(text)
    assert refused(folder).startswith("manifest.json ")


def test_another_version_is_refused(folder: Path):
    content = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).write_text(json.dumps(content | {"version": 2}))
    assert refused(folder) == "manifest.json has version 2; this jaxgpt reads 1"


def test_a_folder_without_manifest_is_not_finished(tmp_path: Path):
    assert refused(tmp_path).endswith("this is not a finished checkpoint")


def test_all_files_and_folders_are_on_disk_after_sealing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    monkeypatch.setattr(manifest, "sync", lambda path: synced.append(str(path.relative_to(folder))))
    manifest.seal(folder)
    # The manifest follows every file it lists, and folders, whose names they are, come last.
    assert sorted(synced[:4]) == sorted(FILES)
    assert synced[4] == manifest.MANIFEST
    assert set(synced[5:]) == {".", "sub", "sub/deep", "train"}
    assert synced[-1] == "."
