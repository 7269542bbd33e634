"""The list of a folder's files with size and SHA-256: what sees a flipped bit.

Array formats load damaged bytes without a word, so a folder is trusted only after
every file in it was compared with its manifest. The manifest carries a digest of
its own list, so that damage to it is not blamed on a file that is whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from jaxgpt.errors import InputError, first

MANIFEST = "manifest.json"
VERSION = 1
WORTH_THREADS = 1 << 20
"""Bytes in all; below them threads take longer to hand files on than to hash them."""
BLOCK = 1 << 22
"""Bytes between two waits for the interpreter, which a busy other thread gives back after 5 ms."""


def seal(folder: Path, hashed: Callable[[int], None] | None = None) -> None:
    """Hash every file of the folder, write its manifest, and force all of it to disk.

    Args:
        folder: its files are listed, in whatever folder below it.
        hashed: told the bytes of each file that was hashed and forced to disk.

    Raises:
        InputError: the folder holds something that is neither file nor folder.
        OSError: the disk is full or fails.
    """
    listed: dict[str, dict[str, Any]] = {}
    found = {name: path for name, path in sorted(files(folder).items()) if name != MANIFEST}
    for (name, path), digest in zip(found.items(), _digests(list(found.values())), strict=True):
        listed[name] = {"size": path.stat().st_size, "sha256": digest}
        sync(path)
        if hashed is not None:
            hashed(listed[name]["size"])
    write_synced(folder / MANIFEST, spelled(listed))
    for path, _, _ in os.walk(folder, topdown=False):
        sync(Path(path))


def verify(folder: Path, *, unhashed: tuple[str, ...] = (), stop: Event | None = None) -> dict[str, int]:
    """Compare the folder with its manifest; sizes by name.

    Args:
        folder: holds `manifest.json`.
        unhashed: files below these folders are compared by name and size only.
        stop: once it is set, nobody waits for the answer.

    Raises:
        InputError: a file that is missing, was not listed, or differs; named in the message.
    """
    listed = read(folder)
    present = files(folder)
    present.pop(MANIFEST)
    _refuse_other_names(listed, present)
    for name, entry in listed.items():
        size = present[name].stat().st_size
        if size != entry["size"]:
            raise InputError(f"{name} has {size:,} bytes, its manifest says {entry['size']:,}")
    hashed = [name for name in listed if not name.startswith(tuple(f"{top}/" for top in unhashed))]
    for name, digest in zip(hashed, _digests([present[name] for name in hashed], stop), strict=True):
        if digest != listed[name]["sha256"]:
            raise InputError(f"{name} fails SHA-256")
    return {name: entry["size"] for name, entry in listed.items()}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's list, `{name: {"size", "sha256"}}`, after it was compared with its own digest.

    Raises:
        InputError: no manifest, another version, damage, or a name that leads outside the folder.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{MANIFEST} is missing in {folder}; this is not a finished checkpoint")
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
        version, listed = content["version"], content["files"]
        damaged = version == VERSION and text != spelled(listed)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{MANIFEST} is damaged: it is not what jaxgpt wrote") from None
    if version != VERSION:
        raise InputError(f"{MANIFEST} has version {version!r}; this jaxgpt reads {VERSION}")
    if damaged or not all(_is_entry(entry) for entry in listed.values()):
        raise InputError(f"{MANIFEST} fails its own SHA-256")
    outside = [name for name in listed if _leads_outside(name)]
    if outside:
        raise InputError(f"{MANIFEST} names {outside[0]}, outside the checkpoint folder; refused")
    return listed


def files(folder: Path) -> dict[str, Path]:
    """Every file below the folder by its relative name; raises InputError for links and devices."""
    return dict(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name, Path(entry.path)
            else:
                # A link could show other bytes to the next reader than were hashed here.
                raise InputError(f"{name} is a link or device, not a file; refused")


def _refuse_other_names(listed: dict[str, dict[str, Any]], present: dict[str, Path]) -> None:
    missing = sorted(listed.keys() - present.keys())
    if missing:
        raise InputError(f"{first(missing)} missing, of {len(listed)} files in {MANIFEST}")
    extra = sorted(present.keys() - listed.keys())
    if extra:
        raise InputError(f"{first(extra)} not in {MANIFEST}; remove what does not belong to the checkpoint")


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        return False
    return type(entry["size"]) is int and isinstance(entry["sha256"], str)


def _leads_outside(name: str) -> bool:
    return "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/"))


def spelled(listed: dict[str, dict[str, Any]]) -> str:
    """The only spelling of a manifest, so that a changed blank is damage as well."""
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    content = {"version": VERSION, "files": listed, "files_sha256": digest}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _digests(paths: Sequence[Path], stop: Event | None = None) -> Iterator[str]:
    """SHA-256 of each file, in order; large ones two at a time, for hashing leaves the interpreter to others."""
    if sum(path.stat().st_size for path in paths) < WORTH_THREADS:
        yield from (sha256(path, stop) for path in paths)
        return
    pool = ThreadPoolExecutor(2)
    try:
        yield from pool.map(partial(sha256, stop=stop), paths)
    finally:
        pool.shutdown(cancel_futures=True)


def sha256(path: Path, stop: Event | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; InputError once `stop` is set."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(BLOCK, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                raise InputError(f"{path.name} was not hashed to its end")
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a text file and force it to disk."""
    path.write_text(text, "utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
