"""Templates from anybody: in a process of their own, with little time and memory, and one line for what they do."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxgpt.errors import InputError
from jaxgpt.jinja import process
from jaxgpt.jinja.process import Failure, Rendering, one_line, render

pytestmark = pytest.mark.slow

ASKED = [Rendering([{"role": "user", "content": "hi"}])]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def outcome(source: str) -> str:
    """What a user would be told, or the text."""
    try:
        return str(render(source, {"bos_token": "<s>"}, ASKED)[0])
    except InputError as error:
        return str(error)


def child() -> subprocess.Popen[bytes]:
    outcome("")
    return process._CHILDREN._of[os.getpid()]  # pyright: ignore[reportPrivateUsage]


def status(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


# -- Hostile templates -----------------------------------------------------------------

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TIME, MEMORY, FORBIDDEN = "did not finish in 1 s", "needed more than 400 MiB", "used a forbidden attribute"
DEEP, OUTPUT, SYNTAX = (
    "it nests or calls itself too deeply",
    "wrote more than 4 million characters",
    "is not valid Jinja",
)
NOTHING = "^$"
"""What the sandbox makes of an attribute that is not used any further."""
HOSTILE = {
    LOOP: TIME,
    "{{ (range(99999) | list | string) * 99 | length }}": f"{MEMORY}|{OUTPUT}|failed",
    "{{ 7 ** (7 ** (7 ** 7)) }}": f"{TIME}|{MEMORY}|failed",
    "{{ (10 ** 99999) ** 99999 }}": f"{TIME}|{MEMORY}",
    "{{ 'a' * 10**9 }}": MEMORY,
    "{{ [0] * 10**9 }}": MEMORY,
    "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}": MEMORY,
    "{{ '%999999999d' % 1 }}": MEMORY,
    "{{ '{:>999999999}'.format(1) }}": MEMORY,
    "{{ 'a' | center(10**9) }}": MEMORY,
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}": OUTPUT,
    "{{ 'a' * 5000000 }}": OUTPUT,
    "{{ raise_exception('a' * 10**7) }}": "refuses the conversation: aaa",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": DEEP,
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": DEEP,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": DEEP,
    "{{ " + "-" * 100_000 + "1 }}": DEEP,
    "{% if 1 %}" * 500 + "{% endif %}" * 500: "chat template",
    "{% for a in 'a' %}" * 30 + "{% endfor %}" * 30: "chat template",
    "{{ x" + "[0]" * 3000 + " }}": "chat template",
    "{{ ''.__class__.__mro__ }}": FORBIDDEN,
    "{{ ''['__class__'] }}": NOTHING,
    "{{ ''['__class__']['__mro__'] }}": FORBIDDEN,
    "{{ messages.__class__.__base__.__subclasses__() }}": FORBIDDEN,
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": FORBIDDEN,
    "{{ self.__init__.__globals__ }}": FORBIDDEN,
    "{{ raise_exception.__globals__ }}": NOTHING,
    "{{ raise_exception.__globals__.os }}": FORBIDDEN,
    "{{ strftime_now.__globals__['os'] }}": FORBIDDEN,
    "{{ '{0.__class__}'.format(1) }}": NOTHING,
    "{{ '{0.__class__.__mro__}'.format(1) }}": FORBIDDEN,
    "{{ '{0.__class__}' | format(1) }}": "not all arguments converted",
    "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}": FORBIDDEN,
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}": FORBIDDEN,
    "{{ messages.append(1) }}": FORBIDDEN,
    "{{ messages[0].update(role='system') }}": FORBIDDEN,
    "{% set n = namespace(__class__=1) %}": FORBIDDEN,
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": FORBIDDEN,
    "{{ namespace.__mro__[0] }}": FORBIDDEN,
    "{{ dict.__call__.__globals__ }}": FORBIDDEN,
    "{% include '/etc/passwd' %}": "failed",
    "{% import 'os' as os %}": "failed",
    "{% extends 'x' %}": "failed",
    "{{ open('/etc/passwd') }}": "'open' is undefined",
    "{{ range(10**6) }}": "MAX_RANGE",
    "{{ messages[0].content.x.y }}": "has no attribute 'x'",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% if %}": SYNTAX,
    "{{ 'a": SYNTAX,
    "{% endfor %}": SYNTAX,
    "{# never closed": SYNTAX,
    "{% unknown %}": SYNTAX,
    "{{ 'a' | unknown }}": "No filter named 'unknown'",
    "{% raise %}\n\n\x1b[31m": SYNTAX,
    "{{ raise_exception('two\nlines \x1b[31m\u202e\u2028 end') }}": r"two lines \\x1b\[31m\\x202e end",
    "{{ raise_exception('\\ud800') }}": r"\\xd800",
    "{{ raise_exception() }}": "refuses the conversation: no reason given",
}


@contextmanager
def within(seconds: float) -> Generator[None]:
    """Not longer than that, on a machine that may be busy with other tests."""
    start, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (now.ru_utime + now.ru_stime) - (cpu.ru_utime + cpu.ru_stime) < seconds / 2
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: ascii(source[:40]))
def test_a_hostile_template_ends_in_one_line(source: str):
    with within(5.0):
        told = outcome(source)
    assert re.search(HOSTILE[source], told), told
    assert len(told.splitlines()) <= 1
    assert told.isprintable()
    assert len(told) < 400
    assert outcome("{{ bos_token }}ok") == "<s>ok", "the next template renders"
    # Of the process that lives on; one that was ended had the same limit of address space.
    assert status(child().pid, "VmHWM") < 500 * 1024


def test_a_lone_surrogate_does_not_break_the_conversation_with_the_child():
    assert render("{{ '\\ud800' }}", {}, ASKED) == ["\ud800"]
    assert outcome("ok") == "ok"


def test_renderings_of_one_request_share_one_second():
    slow = "{% for i in range(9999) %}{% for j in range(100) %}{% endfor %}{% endfor %}"
    with within(5.0), pytest.raises(InputError, match="did not finish in 1 s"):
        render(slow, {}, ASKED * 1000)


def test_a_failure_of_one_rendering_leaves_the_others():
    asked = [Rendering([{"role": role, "content": ""}]) for role in ("user", "bad", "user")]
    texts = render("{% if messages[0].role == 'bad' %}{{ raise_exception('no') }}{% endif %}x", {}, asked)
    assert texts == ["x", Failure("refused", "no"), "x"]


def test_somebody_else_s_text_becomes_one_printable_line():
    assert one_line(" a\n\tb\x00\x1b\u202e ") == "a b\\x00\\x1b\\x202e"
    assert one_line("x" * 999, 10) == "x" * 10 + "…"


# -- The process -----------------------------------------------------------------------


def test_the_same_process_serves_many_requests():
    first = child().pid
    for i in range(500):
        assert outcome(f"{{# {i % 20} #}}ok") == "ok"
    assert child().pid == first


@LINUX
@pytest.mark.parametrize("requests", [2_000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_memory_does_not_grow_over_thousands_of_requests(requests: int):
    process, before = child(), 0
    for i in range(requests):
        render("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}" + "x" * (i % 50), {}, ASKED)
        if i == requests // 5:
            before = status(process.pid, "VmRSS")
    assert child().pid == process.pid
    assert status(process.pid, "VmRSS") < before + 4096 * requests / 10_000


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_is_started_again(sign: signal.Signals):
    old = child()
    old.send_signal(sign)
    old.wait()
    assert outcome("ok") == "ok"
    assert child().pid != old.pid


def test_an_interrupt_is_the_parent_s_matter():
    process = child()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert outcome("ok") == "ok"
    assert child().pid == process.pid


def test_threads_take_turns():
    wrong: list[str] = []

    def ask(number: int) -> None:
        wrong.extend(text for _ in range(40) if (text := outcome(f"answer {number}")) != f"answer {number}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@LINUX
def test_the_process_can_open_nothing_and_is_small():
    pid = child().pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name, most in (("Max open files", 0), ("Max file size", 0), ("Max address space", 400 << 20)):
        assert f"{name:<26}{most:<21}{most:<21}" in limits
    assert status(pid, "VmRSS") < 60 * 1024
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert not {part.partition(b"=")[0] for part in environment.split(b"\0") if part} - {b"LD_LIBRARY_PATH", b"TZ"}


PARENT = """
import os, sys, threading, time
from jaxgpt.jinja import process
asked = [process.Rendering([{"role": "user", "content": "hi"}])]
process.render("ok", {}, asked)
print(next(iter(process._CHILDREN._of.values())).pid, flush=True)
if sys.argv[1] == "spin":
    threading.Thread(target=lambda: process.render(sys.argv[2], {}, asked), daemon=True).start()
    time.sleep(0.3)
print("ready", flush=True)
if sys.argv[1] != "end":
    time.sleep(60)
"""


@LINUX
@pytest.mark.parametrize("how", ["end", "killed", "spin"])
def test_the_process_does_not_outlive_its_parent(how: str):
    with subprocess.Popen([sys.executable, "-c", PARENT, how, LOOP], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        if how != "end":
            parent.kill()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_fork_asks_a_process_of_its_own():
    code = (
        "import os\n"
        "from jaxgpt.jinja import process as p\n"
        "asked = [p.Rendering([{'role': 'user', 'content': 'hi'}])]\n"
        "p.render('x', {}, asked)\n"
        "fork = os.fork()\n"
        "for i in range(200): assert p.render(f'{fork == 0} {i}', {}, asked) == [f'{fork == 0} {i}']\n"
        "if fork: assert os.waitpid(fork, 0)[1] == 0\n"
        "p._CHILDREN.close()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_an_ended_process_leaves_no_warning():
    code = (
        "from jaxgpt.jinja import process as p\n"
        "print(p.render('ok', {}, [p.Rendering([{'role': 'user', 'content': 'hi'}])]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("['ok']\n", "", 0)
