"""Models of the hub as folders: fetched into `.NAME.partial`, compared byte for byte, renamed when whole.

Every file is written to `FILE.DIGEST.part`, resumed at the byte where it stopped, and
gets its name once its digest is that of the commit. A folder of the final name is
therefore always whole; one that was killed in the middle fetches the rest.
"""

import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jaxgpt import manifest, step_folder
from jaxgpt.array_files import in_bytes
from jaxgpt.errors import InputError, first
from jaxgpt.hub import remote
from jaxgpt.hub.remote import RemoteFile, Snapshot
from jaxgpt.run_lock import RunLock

RECORD = "hub.json"
"""In a downloaded folder: the model, the commit, its files and their digests."""
CONNECTIONS = 8
"""Files fetched at once."""
Progress = Callable[[int, int], None]
"""Told the bytes that are here, and those in all."""


@dataclass(frozen=True)
class Selection:
    """What of a commit is wanted."""

    snapshot: Snapshot
    kind: Literal["checkpoint", "hf"]
    """A run folder of jaxgpt, or a Hugging Face model folder."""
    files: dict[str, RemoteFile]
    left_out: list[str]
    """Names of the others."""

    @property
    def size(self) -> int:
        """Bytes of the files wanted."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Downloaded:
    """A folder that holds what was asked for."""

    selection: Selection
    path: Path
    fetched: int
    """Bytes that came over the network this time; 0 where all was here already."""


# -- Choosing --------------------------------------------------------------------------


def select(snapshot: Snapshot, *, include: Iterable[str] = (), every_step: bool = False) -> Selection:
    """The files of a commit that make a model.

    Of a run folder the newest step, or every one; of a Hugging Face folder safetensors,
    config, tokenizer and card, and what `include` names. Code is never among them,
    pickles only where `include` asks for them.

    Args:
        snapshot: what lies there.
        include: patterns such as `pytorch_model.bin` or `*.gguf`; `*` also matches `/`.
        every_step: of a run folder, the steps between as well.

    Raises:
        InputError: no model among the files, or a pattern that names none or code.
    """
    asked = {name for pattern in include for name in _matching(snapshot, pattern)}
    steps = _steps(snapshot)
    if steps:
        folders = tuple(f"{step}/" for step in (steps if every_step else steps[-1:]))
        wanted = {name for name in snapshot.files if name.startswith(folders)}
        # A step holds what its manifest lists and nothing else.
        wanted |= {name for name in asked if not name.startswith(tuple(f"{step}/" for step in steps))}
    else:
        if "config.json" not in snapshot.files and not asked:
            raise InputError(
                f"{snapshot.name} holds neither a checkpoint of jaxgpt (step-00000120/{manifest.MANIFEST}) nor a "
                f"Hugging Face model (config.json), but {_some(snapshot)}; --include PATTERN fetches other files"
            )
        wanted = {name for name in snapshot.files if remote.is_hf_file(name)} | asked
        if "model.safetensors" in wanted:
            wanted -= {name for name in wanted - asked if name.startswith("model") and name != "model.safetensors"}
        if not asked and not any(name.endswith(".safetensors") for name in wanted):
            raise InputError(
                f"{snapshot.name} has no model.safetensors, but {_some(snapshot)}; other weights, pickles among them, "
                "come only when asked for: --include PATTERN"
            )
    files = {name: file for name, file in snapshot.files.items() if name in wanted}
    left_out = sorted(name for name in snapshot.files.keys() - wanted if not name.startswith(".git"))
    return Selection(snapshot, "checkpoint" if steps else "hf", files, left_out)


def _steps(snapshot: Snapshot) -> list[str]:
    """Names of the folders of finished steps, oldest first."""
    parts = [name.split("/") for name in snapshot.files]
    found = [p[0] for p in parts if len(p) == 2 and p[1] == manifest.MANIFEST and step_folder.STEP.fullmatch(p[0])]
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


def _matching(snapshot: Snapshot, pattern: str) -> list[str]:
    found = fnmatch.filter(snapshot.files, pattern)
    if not found:
        raise InputError(f"--include {pattern}: no file of {snapshot.name} matches; it has {_some(snapshot)}")
    data = [name for name in found if os.path.splitext(name)[1].lower() not in remote.CODE]
    if not data:
        raise InputError(f"--include {pattern}: {first(found)} is code, which is never downloaded; read it on the hub")
    return data


def _some(snapshot: Snapshot) -> str:
    names = [name for name in snapshot.files if not name.startswith(".git")]
    return first(sorted(names)) if names else "no files"


# -- Fetching --------------------------------------------------------------------------


def download(selection: Selection, out: str | Path, *, progress: Progress | None = None) -> Downloaded:
    """Fetch a model into a folder that is there whole, or not at all.

    Started again after it was killed, it fetches only the rest. Where the folder holds
    the same files of the same commit already, nothing is fetched.

    Args:
        selection: what to fetch.
        out: the folder; must not hold anything else.
        progress: called from several threads.

    Raises:
        InputError: OUT holds something else; the disk is full; the hub cannot be asked,
            is cut off or sends other bytes than it announced; or a step that does not
            match its manifest. What has arrived whole is kept for the next try.
    """
    out = Path(out).absolute()
    if _is_there(out, selection):
        return Downloaded(selection, out, 0)
    try:
        return Downloaded(selection, out, _download(selection, out, progress))
    except OSError as error:
        if error.errno in remote.FULL:
            raise InputError(remote.DISK_FULL.format(selection.snapshot.name)) from None
        raise


def _download(selection: Selection, out: Path, progress: Progress | None) -> int:
    """Bytes that were fetched."""
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with RunLock(partial) as lock:
        lock.acquire()
        transfer = _Transfer(selection, partial, progress)
        files = selection.files
        if selection.kind == "checkpoint":
            transfer.run({name: file for name, file in files.items() if name.endswith(f"/{manifest.MANIFEST}")})
            files = _of_manifests(selection, partial)
        transfer.run(files)
        _remove_others(partial, files)
        if selection.kind == "checkpoint":
            _verify(selection, partial)
        _record(selection, files, partial)
        for folder, _, _ in os.walk(partial, topdown=False):
            manifest.sync(Path(folder))
        os.rename(partial, out)
        manifest.sync(out.parent)
    return transfer.fetched


def _is_there(out: Path, selection: Selection) -> bool:
    """The folder holds the selection; raises InputError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        record = json.loads((out / RECORD).read_text("utf-8"))
        name, commit, digests = record["name"], record["commit"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} exists and is no download of {selection.snapshot.name}; give another --out") from None
    wanted = selection.snapshot
    if (name, commit) != (wanted.name, wanted.commit):
        here, there = f"{name} at {commit[:12]}", f"{wanted.name} at {wanted.commit[:12]}"
        raise InputError(f"{out} holds {here}, not {there}; move it away, or give another --out")
    files = {n: selection.files[n] for n in selection.files.keys() & digests.keys()}
    asked = _required(selection)
    if asked - files.keys() or any(digests[n] != f.digest or _size(out / n) != f.size for n, f in files.items()):
        raise InputError(f"{out} holds other files of {name} at {commit[:12]} than asked for; give another --out")
    return True


def _required(selection: Selection) -> set[str]:
    """Names without which a folder is another download; files beside a manifest's list are not fetched."""
    steps = tuple(f"{step}/" for step in _folders_of(selection))
    return {name for name in selection.files if not name.startswith(steps) or name.endswith(f"/{manifest.MANIFEST}")}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


class _Transfer:
    """Fetches files into the partial folder, several at once; the first failure stops all."""

    def __init__(self, selection: Selection, partial: Path, progress: Progress | None):
        self.snapshot = selection.snapshot
        self.partial = partial
        self.total = selection.size
        self.fetched = 0
        self.stopped = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()
        self._here: dict[str, int] = {}
        """Bytes of each file that are on disk."""
        remote.package()
        remote.no_bars()

    def run(self, files: Mapping[str, RemoteFile]) -> None:
        """Fetch what is not there yet; raises as `download`."""
        todo = [file for file in files.values() if not self._whole(file)]
        self._require_space(todo)
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="download")
        try:
            futures = [pool.submit(self._fetch, file) for file in todo]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failures = [error for future in done if (error := future.exception()) is not None]
            if failures:
                raise failures[0]
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)
            self.stopped.clear()

    def _whole(self, file: RemoteFile) -> bool:
        path = self.partial / file.name
        if path.is_file() and file.matches(path):
            self._advance(file, file.size)
            return True
        return False

    def _require_space(self, todo: list[RemoteFile]) -> None:
        need = sum(file.size - max(_size(self._part(file)), 0) for file in todo)
        free = shutil.disk_usage(self.partial).free
        if need > free:
            raise InputError(
                f"disk full: {self.snapshot.name} needs {in_bytes(need)} more in {self.partial.parent}, "
                f"{in_bytes(free)} are free; free some space, or give another --out"
            )

    def _part(self, file: RemoteFile) -> Path:
        return self.partial / f"{file.name}.{file.digest[:12]}.part"

    def _fetch(self, file: RemoteFile) -> None:
        from huggingface_hub import file_download, utils

        part = self._part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        if _size(part) > file.size:
            part.unlink()
        url = remote.url_of(self.snapshot, file)
        with remote.answers(self.snapshot.name), part.open("ab") as raw:
            begin = raw.tell()
            self._advance(file, begin)
            target: Any = _Announced(raw, file, self)
            headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"}
            if file.size:
                file_download.http_get(url, target, resume_size=begin, headers=headers, expected_size=file.size)
        if not file.matches(part):
            part.unlink()
            raise InputError(
                f"{file.name} of {self.snapshot.name} arrived with other bytes than {remote.endpoint()} announced; "
                "it was thrown away, start again to fetch it anew"
            )
        manifest.sync(part)
        os.replace(part, self.partial / file.name)

    def arrived(self, file: RemoteFile, here: int, more: int) -> None:
        """Bytes of a file that came over the network: how many are on disk, how many are new."""
        with self._lock:
            self.fetched += more
        self._advance(file, here)

    def _advance(self, file: RemoteFile, here: int) -> None:
        with self._lock:
            self._here[file.name] = here
            if self._progress is not None:
                self._progress(sum(self._here.values()), self.total)


class _Announced:
    """A file that takes no more bytes than were announced, and none once all was stopped."""

    def __init__(self, raw: BinaryIO, file: RemoteFile, transfer: _Transfer):
        self._raw = raw
        self._file = file
        self._transfer = transfer

    def write(self, block: bytes) -> int:
        here = self._raw.tell() + len(block)
        if self._transfer.stopped.is_set():
            raise InputError("stopped, as another file failed")
        if here > self._file.size:
            raise InputError(
                f"{self._file.name} of {self._transfer.snapshot.name} has more bytes than the {self._file.size:,} that "
                f"{remote.endpoint()} announced; stopped"
            )
        written = self._raw.write(block)
        # What is killed now is resumed here.
        self._raw.flush()
        self._transfer.arrived(self._file, here, len(block))
        return written

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, position: int) -> int:
        return self._raw.seek(position)

    def truncate(self) -> int:
        return self._raw.truncate()


# -- Judging ---------------------------------------------------------------------------


def _of_manifests(selection: Selection, partial: Path) -> dict[str, RemoteFile]:
    """The files that the steps' manifests list, and others that were asked for by name."""
    steps = _folders_of(selection)
    found = {name: file for name, file in selection.files.items() if not name.startswith(tuple(f"{s}/" for s in steps))}
    for step in steps:
        try:
            listed = [manifest.MANIFEST, *manifest.read(partial / step)]
            missing = [name for name in listed if f"{step}/{name}" not in selection.files]
            if missing:
                raise InputError(f"{first(missing)} missing, of {len(listed) - 1} files in {manifest.MANIFEST}")
        except InputError as error:
            raise _damaged(selection, partial, step, error) from None
        found |= {f"{step}/{name}": selection.files[f"{step}/{name}"] for name in listed}
    return found


def _verify(selection: Selection, partial: Path) -> None:
    for step in _folders_of(selection):
        try:
            manifest.verify(partial / step)
            step_folder.read(partial / step)
        except InputError as error:
            raise _damaged(selection, partial, step, error) from None


def _folders_of(selection: Selection) -> list[str]:
    return _steps(Snapshot(selection.snapshot.name, selection.snapshot.commit, selection.files))


def _damaged(selection: Selection, partial: Path, step: str, error: InputError) -> InputError:
    """The bytes are the hub's, so fetching them again is of no use."""
    shutil.rmtree(partial, ignore_errors=True)
    name = selection.snapshot.name
    return InputError(f"{name} is damaged at {remote.endpoint()}: {step}: {error}; nothing was kept, tell its owner")


def _remove_others(partial: Path, files: Mapping[str, RemoteFile]) -> None:
    """What an earlier try for other files left."""
    for name, path in manifest.files(partial).items():
        if name not in files:
            path.unlink()
    for folder, _, _ in os.walk(partial, topdown=False):
        if folder != str(partial) and not os.listdir(folder):
            os.rmdir(folder)


def _record(selection: Selection, files: Mapping[str, RemoteFile], partial: Path) -> None:
    content = {
        "name": selection.snapshot.name,
        "endpoint": remote.endpoint(),
        "commit": selection.snapshot.commit,
        "files": {name: file.digest for name, file in sorted(files.items())},
    }
    manifest.write_synced(partial / RECORD, json.dumps(content, indent=1) + "\n")
