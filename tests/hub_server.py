"""A Hugging Face hub on 127.0.0.1: the endpoints huggingface_hub 2.4 uses for models, and faults on demand.

What it answers was read from huggingface_hub's source: `model_info`, `list_repo_tree` (pages),
`list_models` (pages), `resolve` (ETag, X-Repo-Commit, X-Linked-*, redirect of LFS objects, Range),
`repos/create`, `branch`, `preupload`, the LFS batch API and `commit`. Nothing here is xet.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretOfTheTests"
LFS_FROM = 300
"""Bytes from which a file is an LFS object; smaller ones are git's."""
CUT_FROM = 100_000
"""Bytes from which a file's connection may be cut."""
PAGE = 3
"""Entries of a page, so that every list has several."""


@dataclass
class Repo:
    """A model: its branches, and the files of every commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


@dataclass
class Request:
    """What was asked, as the tests look at it."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """The server's state; a test may change all of it while it runs."""

    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    served: int = 0
    """Bytes of file contents sent."""
    tamper: Callable[[bytes], bytes] = lambda content: content
    """What is sent in the place of a file's content."""
    cut: list[int] = field(default_factory=list)
    """Each takes the next large file's connection away after so many bytes."""
    ignore_range: bool = False
    unmeasured: bool = False
    """Files come without their length."""
    delay: float = 0.0
    """Seconds between two pieces of a file."""
    piece: int = 1 << 16
    status: int = 0
    """If set, the answer to everything."""
    status_of_files: int = 0
    """If set, the answer to `resolve` alone."""
    status_of_commits: int = 0
    """If set, the answer to `commit` alone."""
    stall: float = 0.0
    """Seconds until `tree` answers."""
    cdn: str = ""
    """Where large files are; this server if empty."""
    answer: bytes | None = None
    """If set, the body of every answer of the API."""
    ignored: str = ""
    """Files with this in their name are left out of commits, as a .gitignore does."""
    listed: dict[str, Any] = field(default_factory=dict)
    """Changes to entries of the tree, by path."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", **flags: bool) -> str:
        """A commit with exactly these files; its hash."""
        repo = self.repos.setdefault(name, Repo(**flags))
        text = json.dumps([name, branch, len(repo.commits), sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        return commit

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[name].commits[self.repos[name].branches[branch]]

    def fetched(self) -> list[str]:
        """Paths of the files whose content was asked for."""
        paths = [r.path for r in self.requests if r.method == "GET" and "/resolve/" in r.path]
        return [unquote(path.split("/resolve/")[1].split("/", 1)[1]) for path in paths]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # -- Answers -----------------------------------------------------------------------

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode() if self.hub.answer is None else self.hub.answer
        self._send(200, body, {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v})

    def _page(self, entries: list[Any], query: dict[str, list[str]], path: str) -> None:
        begin = int(query.get("cursor", ["0"])[0])
        headers: dict[str, str] = {}
        if begin + PAGE < len(entries):
            kept = "&".join(f"{k}={v[0]}" for k, v in query.items() if k != "cursor")
            headers["Link"] = f'<{self.hub.url}{path}?{kept}&cursor={begin + PAGE}>; rel="next"'
        self._json(entries[begin : begin + PAGE], headers)

    # -- Requests ----------------------------------------------------------------------

    def _handle(self) -> None:
        url = urlsplit(self.path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = token
        self.hub.requests.append(Request(self.command, url.path, self.headers.get("Range"), token))
        if self.hub.status:
            return self._error(self.hub.status, message="as the test asked")
        if token is not None and token != TOKEN:
            return self._error(401, message="Invalid credentials in Authorization header")
        query = parse_qs(url.query)
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {url.path}")
            if match:
                return answer(self, query, *(unquote(group) for group in match.groups()))
        self._error(404, message=f"no such endpoint: {self.command} {url.path}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            self._error(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.branches.get(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def models(self, query: dict[str, list[str]]) -> None:
        author = query.get("author", [""])[0]
        found = [
            {"id": name, "private": repo.private, "gated": repo.gated, "lastModified": "2026-01-02T03:04:05.000Z"}
            for name, repo in sorted(self.hub.repos.items())
            if name.startswith(f"{author}/") and (self.token or not repo.private)
        ]
        self._page(found, query, "/api/models")

    def info(self, query: dict[str, list[str]], name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if repo and commit:
            self._json({"id": name, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": []})

    def tree(self, query: dict[str, list[str]], name: str, revision: str) -> None:
        time.sleep(self.hub.stall)
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if not repo or not commit:
            return
        entries: list[dict[str, Any]] = []
        files = repo.commits[commit]
        folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        for path, content in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if len(content) >= LFS_FROM:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry | self.hub.listed.get(path, {}))
        self._page(entries, query, f"/api/models/{name}/tree/{revision}")

    def resolve(self, query: dict[str, list[str]], name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if not repo or not commit:
            return
        if repo.gated and self.token is None:
            return self._error(401, "GatedRepo", "Access to this model is restricted")
        if self.hub.status_of_files:
            return self._error(self.hub.status_of_files, message="as the test asked")
        content = repo.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_blob(content)}"', "Accept-Ranges": "bytes"}
        if len(content) < LFS_FROM:
            return self._content(content, headers)
        oid = hashlib.sha256(content).hexdigest()
        self.hub.lfs[oid] = content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn or self.hub.url}/cdn/{oid}"})

    def cdn(self, query: dict[str, list[str]], oid: str) -> None:
        self._content(self.hub.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.tamper(content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        begin = int(wanted[1]) if wanted and not self.hub.ignore_range else 0
        self.send_response(206 if begin else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if self.hub.unmeasured:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_cut = len(content) >= CUT_FROM and self.hub.cut
        stop = begin + self.hub.cut.pop(0) if is_cut else len(content)
        for at in range(begin, min(stop, len(content)), self.hub.piece):
            piece = content[at : min(at + self.hub.piece, stop)]
            self.wfile.write(piece)
            self.wfile.flush()
            self.hub.served += len(piece)
            time.sleep(self.hub.delay)
        self.close_connection = self.hub.unmeasured or stop < len(content)

    # -- Writing -----------------------------------------------------------------------

    def _may_write(self) -> bool:
        if self.token is None:
            self._error(401, message="Invalid username or password.")
        return self.token is not None

    def create(self, query: dict[str, list[str]]) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self._may_write():
            return
        if wanted["organization"] == "not-mine":
            return self._error(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            answer = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return self._send(409, json.dumps(answer).encode())
        self.hub.add(name, {".gitattributes": b"* text\n"}, private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, query: dict[str, list[str]], name: str, branch: str) -> None:
        if not self._may_write():
            return
        repo = self.hub.repos[name]
        if branch in repo.branches:
            return self._error(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def preupload(self, query: dict[str, list[str]], name: str, revision: str) -> None:
        if not self._may_write():
            return
        present = self.hub.files(name, revision)
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                "shouldIgnore": bool(self.hub.ignored) and self.hub.ignored in file["path"],
                "oid": git_blob(present[file["path"]]) if file["path"] in present else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": answers})

    def batch(self, query: dict[str, list[str]], name: str) -> None:
        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            link = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            return wanted if wanted["oid"] in self.hub.lfs else {**wanted, "actions": {"upload": link}}

        self._json({"transfer": "basic", "objects": [answer(o) for o in json.loads(self.body)["objects"]]})

    def put(self, query: dict[str, list[str]], oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, message="the bytes are not those of the oid")
        self.hub.lfs[oid] = self.body
        self._send(200)

    def commit(self, query: dict[str, list[str]], name: str, revision: str) -> None:
        if not self._may_write():
            return
        if self.hub.status_of_commits:
            return self._error(self.hub.status_of_commits, message="as the test asked")
        files = dict(self.hub.files(name, revision))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        commit = self.hub.add(name, files, branch=revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def yaml(self, query: dict[str, list[str]]) -> None:
        self._json({"errors": [], "warnings": []})


_NAME = r"([^/]+(?:/[^/]+)?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/models", _Handler.models),
    (rf"GET /api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (r"(?:GET|HEAD) /cdn/([0-9a-f]{64})", _Handler.cdn),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.yaml),
    (rf"POST /api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", _Handler.put),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that is killed in the middle of a file is part of the tests; a bug of this server is not.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Running:
    """`with Running() as hub:` serves it on a free port."""

    def __enter__(self) -> Hub:
        self.hub = Hub()
        handler = type("Handler", (_Handler,), {"hub": self.hub})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.hub.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
