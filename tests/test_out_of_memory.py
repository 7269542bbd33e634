"""Out of memory is one line that says what to lower, and how much memory there is is read, not guessed."""

import errno
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import cli, device_memory, out_of_memory


def xla() -> None:
    jnp.zeros(10**14).block_until_ready()


def numpy() -> None:
    np.zeros(10**15)


def python() -> None:
    bytearray(1 << 60)


def system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [(xla, ", 400000000000000 bytes were asked for at once"), (numpy, ", 7.11 PiB were"), (python, ""), (system, "")],
)
@pytest.mark.parametrize(("verb", "remedy"), [("sft", "halve --batch-size and double --accumulate"), ("check", "free")])
def test_memory_that_is_not_there_is_one_line_and_no_traceback(allocate, asked, verb, remedy, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda _: allocate())
    assert cli.main([verb]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"jaxgpt: out of memory{asked}")
    assert f"; {remedy}" in printed.err
    assert printed.err.count("\n") == 1
    assert cli.main([verb, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_of_xla_stay_bugs(capsys, monkeypatch):
    def failed(_: object) -> int:
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(cli, "_run", failed)
    assert cli.main(["sft"]) == 1
    assert "this is a bug in jaxgpt" in capsys.readouterr().err
    assert not out_of_memory.means(OSError(errno.ENOSPC, "No space left on device"))


def test_every_verb_that_is_named_exists():
    assert set(out_of_memory.REMEDIES) <= {verb.name.split()[0] for verb in cli.VERBS}


# -- What there is -----------------------------------------------------------------------


def group(folder: Path, limit: str, used: int, idle: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, str(used), f"anon 5\n{names[2]} {idle}\n"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(value)


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_control_groups_of_both_versions_limit_and_so_do_those_above(tmp_path):
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("5:cpu:/\n4:memory:/job/inner\n0::/user/box\n")
    group(mount / "memory" / "job" / "inner", "9223372036854771712", 9, 1, V1)
    group(mount / "memory" / "job", "4000", 1500, 500, V1)
    group(mount / "user" / "box", "3000", 700, 100, V2)
    group(mount / "user", "max", 9, 1, V2)
    assert device_memory.cgroups(proc, mount) == [(4000, 1000), (3000, 600)]
    assert device_memory.cgroups(tmp_path / "nothing", mount) == []


def test_memory_that_a_program_takes_is_seen_and_an_address_space_limit_counts():
    code = """
import resource
from jaxgpt import device_memory
before = device_memory.free(), device_memory.used()
held = bytearray(b"x") * 300_000_000
print(device_memory.used() - before[1], device_memory.peak() >= device_memory.used())
resource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12))
free = device_memory.free()
resource.setrlimit(resource.RLIMIT_AS, (device_memory._statm(0) + 500_000_000,) * 2)
print(free > 500_000_000, 300_000_000 < device_memory.free() <= 500_000_000, device_memory.total() < free)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, *others = done.stdout.split()
    assert 290_000_000 < int(taken) < 330_000_000
    assert others == ["True"] * 4


def test_on_an_accelerator_the_pool_is_asked(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 60}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    measured = [getattr(device_memory, name)() for name in ("total", "used", "free", "peak")]
    assert measured == [100, 30, 70, 60]
