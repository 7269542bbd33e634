"""The Hugging Face hub, spoken to through the package huggingface_hub: what lies there, and its errors in one line.

What a hub says is not trusted: names that leave a folder are refused, and a file counts
when its bytes have the digest of the commit's list, SHA-256 of a large file, git's
SHA-1 of a small one.
"""

import errno
import hashlib
import os
import re
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxgpt.errors import InputError

PUBLIC_HUB = "https://huggingface.co"
TIMEOUT = 60.0
"""Seconds of silence after which an upload's step has failed."""
ANSWER_TIMEOUT = 20.0
"""Seconds of silence after which a question has failed."""
MOST_ENTRIES = 200_000
"""Of one list; a hub that goes on for ever is none."""
CODE = {".py", ".pyc", ".pyd", ".so", ".sh", ".bat", ".ps1", ".js", ".ipynb", ".dll", ".exe", ".dylib"}
"""Endings of what could only be run: neither downloaded nor uploaded."""
_HF_FILE = re.compile(
    r"(config|generation_config|model\.safetensors\.index|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template|golden)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|merges\.txt|tokenizer\.model|chat_template\.jinja"
    r"|additional_chat_templates/[\w.-]+\.jinja|README\.md|LICENSE[\w.-]*"
)
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL = "the disk is full; what has arrived of {} is kept, so free some space and start again"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit."""

    name: str
    """With `/` between folders; never leads outside."""
    size: int
    """Bytes."""
    digest: str
    """SHA-256 (64 digits) of a large file, git's SHA-1 (40 digits) of a small one."""

    def matches(self, content: Path | bytes) -> bool:
        """The content has this file's size and digest."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size:
            return False
        kind = hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
        if isinstance(content, bytes):
            kind.update(content)
        else:
            with content.open("rb") as file:
                while block := file.read(1 << 20):
                    kind.update(block)
        return kind.hexdigest() == self.digest


@dataclass(frozen=True)
class Snapshot:
    """One commit of a model."""

    name: str
    commit: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Model:
    """An entry of a group's list."""

    name: str
    private: bool
    gated: bool
    modified: str
    """Day of the last change, `2026-01-02`, or empty."""


# -- The package -----------------------------------------------------------------------


def package() -> Any:
    """The module huggingface_hub, told to be quiet; raises InputError where it is not installed."""
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise InputError("huggingface_hub is not installed; `pip install 'jaxgpt[hub]'` brings it") from None
    # Its warnings are of retries, whose outcome is an error of ours or none.
    hub_logging.set_verbosity_error()
    huggingface_hub.get_session().timeout = TIMEOUT
    # Its 10 MiB are as much of each file as a kill would lose.
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
    return huggingface_hub


def no_bars() -> None:
    """The package draws no progress bars."""
    from huggingface_hub.utils import disable_progress_bars

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS=0 asks for bars on a terminal, not in a file
        disable_progress_bars()


def endpoint() -> str:
    """The hub that is asked: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB


def token() -> str | None:
    """The user's token: HF_TOKEN, or what `hf auth login` stored."""
    return package().get_token()


def api() -> Any:
    """The package's client of `endpoint()`."""
    return package().HfApi(endpoint=endpoint())


# -- What lies there -------------------------------------------------------------------


def models(group: str) -> list[Model]:
    """Models of a user or organisation that the token may see, by name.

    Raises:
        InputError: no group's name, none found, or the hub cannot be asked.
    """
    if not _NAME.fullmatch(group) or "/" in group:
        raise InputError(f"{group!r} is no group; give a user or organisation, such as openai-community")
    session = package().get_session()
    with answers(group):
        # Asked once without retries: an unreachable hub is said at once.
        session.head(endpoint(), timeout=ANSWER_TIMEOUT)
        found = [_model(entry) for entry in _entries("/api/models", author=group)]
    if not found:
        raise InputError(f"{group} has no models at {endpoint()} {_seen_with()}; check the spelling")
    return sorted(found, key=lambda model: model.name)


def snapshot(name: str, revision: str = "") -> Snapshot:
    """The files of a model at a branch, tag or commit (the main branch if none is given).

    Raises:
        InputError: no such model or revision, or the hub cannot be asked, or it lists
            a file that leads outside the folder.
    """
    check_name(name)
    client = api()
    with answers(name, revision):
        info = client.model_info(name, revision=revision or None, timeout=ANSWER_TIMEOUT)
        commit = _matching(r"[0-9a-f]{40}", info.sha)
        entries = _entries(f"/api/models/{name}/tree/{commit}", recursive=True)
        found = [_remote_file(entry) for entry in entries if entry["type"] == "file"]
    outside = [file.name for file in found if _leads_outside(file.name)]
    if outside:
        raise InputError(
            f"{name} at {endpoint()} lists the file {outside[0]!r}, which leads outside the folder; refused"
        )
    return Snapshot(name, commit, {file.name: file for file in found})


def url_of(snapshot: Snapshot, file: RemoteFile) -> str:
    """Where the file's bytes are, at exactly this commit."""
    return f"{endpoint()}/{snapshot.name}/resolve/{snapshot.commit}/{quote(file.name)}"


def check_name(name: str) -> None:
    """Raises InputError for what cannot be a model's name."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise InputError(f"{name!r} is no model's name; expected OWNER/MODEL, such as openai-community/gpt2")


def is_hf_file(name: str) -> bool:
    """A file of a Hugging Face model folder that holds data alone: weights, config, tokenizer, card, license."""
    return _HF_FILE.fullmatch(name) is not None


def _entries(path: str, **params: Any) -> Iterator[dict[str, Any]]:
    """A list of the hub, page by page; `HfApi`'s own methods for it wait for ever for a hub that says nothing."""
    from huggingface_hub import utils

    pages = utils.paginate(endpoint() + path, params, headers=utils.build_hf_headers(), timeout=ANSWER_TIMEOUT)
    for number, entry in enumerate(pages):
        if number >= MOST_ENTRIES:
            raise ValueError(f"a list of more than {MOST_ENTRIES:,} entries")
        yield entry


def _model(entry: dict[str, Any]) -> Model:
    modified = re.match(r"\d{4}-\d\d-\d\d", str(entry.get("lastModified", "")), re.ASCII)
    return Model(
        name=_matching(_NAME.pattern, entry["id"]),
        private=bool(entry.get("private")),
        gated=bool(entry.get("gated")),
        modified=modified[0] if modified else "",
    )


def _matching(pattern: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise ValueError(f"{str(value)[:60]!r} is not of the form expected")
    return value


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    name, content = entry["path"], entry.get("lfs") or entry
    size, digest = content["size"], _matching(r"[0-9a-f]{40}|[0-9a-f]{64}", content["oid"])
    if type(size) is not int or size < 0 or not isinstance(name, str):
        raise ValueError(f"a file {str(name)[:60]!r} of {str(size)[:20]} bytes")
    return RemoteFile(name, size, digest)


def _leads_outside(name: str) -> bool:
    if not name.isprintable() or "\\" in name or re.match(r"[A-Za-z]:", name):
        return True
    return any(part in ("", ".", "..") for part in name.split("/"))


# -- Errors ----------------------------------------------------------------------------


@contextmanager
def answers(name: str, revision: str = "") -> Generator[None]:
    """Turn what huggingface_hub raises into one line that names the model and the hub.

    Raises:
        InputError: for every failure of the hub or the way to it; the token is never in it.
    """
    try:
        yield
    except (InputError, AssertionError):
        raise
    except Exception as error:
        message = _said(_cause(error), name, revision)
        if message is None:
            raise
        secret = token()
        raise InputError(message.replace(secret, "<token>") if secret else message) from None


def _cause(error: BaseException) -> BaseException:
    """The package wraps what happened in a worker of its own into a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _said(error: BaseException, name: str, revision: str) -> str | None:
    kind, where = type(error).__name__, endpoint()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "OfflineModeIsEnabled":
        return f"HF_HUB_OFFLINE is set, so {where} was not asked for {name}; unset it, or use a folder on this machine"
    if status is not None:
        return _status(error, status, name, revision)
    if _of_transport(error):
        said = f" ({_first_line(error)})" if str(error) else ""
        return (
            f"the hub could not be reached: asking {where} for {name} failed with {kind}{said}; "
            "check the network, the proxy and HF_ENDPOINT, then start again"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return DISK_FULL.format(name)
    if isinstance(error, OSError) and error.errno is not None:
        return None
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return f"{where} sent another number of bytes than it announced for a file of {name}; start again"
    if isinstance(error, OSError | ValueError | KeyError | TypeError | AttributeError | RuntimeError):
        return f"{where} did not answer for {name} as a hub does ({kind}: {_first_line(error)}); check HF_ENDPOINT"
    return None


def _status(error: BaseException, status: int, name: str, revision: str) -> str:
    kind, where = type(error).__name__, endpoint()
    if kind == "GatedRepoError":
        return f"{name} is gated {_seen_with()}: accept its terms at {where}/{name}, then set HF_TOKEN to your token"
    if kind == "RevisionNotFoundError":
        return f"{name} has no revision {revision!r}; give a branch, a tag or a commit of {where}/{name}"
    if status in (401, 403) and "credentials" in str(error):
        return f"{where} refused the token for {name} (401); set HF_TOKEN to a valid one, or unset it"
    if kind == "RepositoryNotFoundError" or status == 404:
        return (
            f"there is no model {name} at {where} {_seen_with()} ({status}); "
            "check the spelling, and for a private one HF_TOKEN"
        )
    if status in (401, 403):
        return f"{where} does not allow this for {name} {_seen_with()} ({status}); set HF_TOKEN to one that may"
    if status == 429:
        return f"{where} has had too many requests from here (429); wait some minutes, then start again"
    return f"{where} answered {status} for {name}; start again later, what has arrived is kept"


def _of_transport(error: BaseException) -> bool:
    """Raised below HTTP: no connection, a timeout, a connection cut short."""
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpx2") for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    # A token that no header can carry is quoted by the client.
    return re.sub("Bearer .*", "Bearer <token>", " ".join(str(error).split()))[:120]


def _seen_with() -> str:
    return "with the token given" if token() else "without a token"
