"""Rendering imported chat templates in a child process; the sole user of `child`.

One child serves all threads and templates of a process. It is started when first
needed, started anew after a template had to be stopped, and ends with its parent.
"""

import atexit
import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.errors import InputError

SECONDS_TO_START = 60.0
SECONDS_TO_ANSWER = 4.0
"""By the clock; the child itself stops after one second of processor time."""
LONGEST_REPLY = 256 << 20


_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
_MEANING = {
    "syntax": "chat template is not valid Jinja: {}",
    "refused": "chat template refuses the conversation: {}",
    "forbidden": "chat template used a forbidden attribute: {}",
    "output": "chat template wrote more than 4 million characters of its own",
    "memory": "chat template needed more than 400 MiB of memory",
    "failed": "chat template failed: {}",
}
_TIMED_OUT = "chat template did not finish in 1 s"
_DIED = "chat template ended the process it ran in"


@dataclass(frozen=True)
class Failure:
    """Why a rendering came to nothing."""

    kind: str
    """A key of `_MEANING`; only `refused` and `failed` can depend on the conversation."""
    detail: str

    def __str__(self) -> str:
        return _MEANING[self.kind].format(one_line(self.detail) or "no reason given")

    @property
    def harmful(self) -> bool:
        """The template itself is at fault, not what it was given."""
        return self.kind not in ("refused", "failed")


@dataclass(frozen=True)
class Rendering:
    """What is asked of a template: a text for these messages."""

    messages: Sequence[Mapping[str, object]]
    generation_prompt: bool = False


def one_line(text: str, length: int = 200) -> str:
    """Somebody else's text where a message needs one line: no line breaks, no control characters, not too long."""
    flat = " ".join(text.split())
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in flat[:length])
    return shown + ("…" if len(flat) > length else "")


def render(source: str, variables: Mapping[str, str], renderings: Sequence[Rendering]) -> list[str | Failure]:
    """The text of each rendering, or why there is none; all of them within one second.

    Args:
        source: a Jinja template.
        variables: what it may use besides the messages: `bos_token` and the like.
        renderings: what to render.

    Raises:
        InputError: the template did not finish, or ended its process.
    """
    asked = [
        {"messages": [dict(m) for m in r.messages], "add_generation_prompt": r.generation_prompt} for r in renderings
    ]
    request = json.dumps({"source": source, "variables": dict(variables), "renderings": asked})
    reply = json.loads(_CHILDREN.ask(request.encode()))
    answers = [one if isinstance(one, str) else Failure(one["kind"], one["detail"]) for one in reply]
    if len(answers) != len(asked):
        raise InputError(str(answers[0]))
    return answers


class _Children:
    """The child of this process; a fork of it gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[int, subprocess.Popen[bytes]] = {}
        atexit.register(self.close)

    def ask(self, request: bytes) -> bytes:
        with self._lock:
            child = self._alive()
            try:
                _write(child, request)
            except BrokenPipeError:
                # It was ended from outside while it was idle.
                child = self._restarted()
                _write(child, request)
            try:
                return _read(child, SECONDS_TO_ANSWER)
            except EOFError:
                cause = _TIMED_OUT if child.wait() == -signal.SIGPROF else f"{_DIED} (exit status {child.returncode})"
            except TimeoutError:
                cause = _TIMED_OUT
            self.close()
            raise InputError(cause)

    def _alive(self) -> subprocess.Popen[bytes]:
        child = self._of.get(os.getpid())
        return child if child and child.poll() is None else self._restarted()

    def _restarted(self) -> subprocess.Popen[bytes]:
        self.close()
        child = self._of[os.getpid()] = _started()
        try:
            _read(child, SECONDS_TO_START)
        except (EOFError, TimeoutError):
            self.close()
            raise InputError("no chat template can be rendered: its process does not start; reinstall jaxgpt") from None
        return child

    def close(self) -> None:
        """End the child of this process."""
        child = self._of.pop(os.getpid(), None)
        if child is not None:
            child.kill()
            with child:
                pass


_CHILDREN = _Children()


def _started() -> subprocess.Popen[bytes]:
    places = [str(Path(_origin(name)).parent.parent) for name in ("jinja2", "markupsafe")]
    return subprocess.Popen(
        # Isolated and without site: quick to start, and nothing of this environment is loaded.
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), *places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    )


def _origin(package: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"chat templates of other programs need the package {package}; pip install {package}")
    return found.origin


# -- Messages to and from the child ----------------------------------------------------


def _write(child: subprocess.Popen[bytes], payload: bytes) -> None:
    assert child.stdin
    left = memoryview(struct.pack("<Q", len(payload)) + payload)
    while left:
        left = left[os.write(child.stdin.fileno(), left) :]


def _read(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Its next message; raises EOFError where it ended, TimeoutError where nothing came for too long."""
    assert child.stdout
    deadline = time.monotonic() + seconds
    count = struct.unpack("<Q", _exactly(child.stdout.fileno(), 8, deadline))[0]
    if count > LONGEST_REPLY:
        raise TimeoutError
    return _exactly(child.stdout.fileno(), count, deadline)


def _exactly(file: int, count: int, deadline: float) -> bytes:
    ready = select.poll()
    ready.register(file, select.POLLIN)
    parts: list[bytes] = []
    while count:
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(file, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
