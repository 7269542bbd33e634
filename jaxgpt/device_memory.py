"""How much memory the device has, what is used of it, and how much can still be had.

A GPU's figures are those of JAX's own pool (`Device.memory_stats`, which has
`bytes_limit`, `bytes_in_use` and `peak_bytes_in_use`). XLA's CPU client keeps none:
there the process is asked, and what limits it: the machine's available memory, the
control group's limit, and RLIMIT_AS.
"""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
"""Version 1 of control groups writes a number above this where nothing limits."""


def total() -> int:
    """Bytes that could ever be had: what no waiting and no tidying raises."""
    if stats := _pool():
        return stats["bytes_limit"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in cgroups()), *_address_space()])


def used() -> int:
    """Bytes in use now: of the pool, or resident of this process."""
    if stats := _pool():
        return stats["bytes_in_use"]
    return _statm(1)


def free() -> int:
    """Bytes that can still be had now; on a CPU without swap, whose use nobody would wait for."""
    if stats := _pool():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    address_space = (limit - _statm(0) for limit in _address_space())
    return max(0, min([_available(), *(limit - used for limit, used in cgroups()), *address_space]))


def peak() -> int:
    """Most bytes in use since the process began."""
    if stats := _pool():
        return stats["peak_bytes_in_use"]
    # The kernel brings its maximum up to date now and then only.
    return max(_highest(), _statm(1))


def _pool() -> dict[str, int] | None:
    """JAX's pool on an accelerator; None for a CPU, and where a pool tells no limit."""
    import jax

    stats: Any = jax.local_devices()[0].memory_stats()
    return stats if stats and "bytes_limit" in stats else None


def _highest() -> int:
    # Kilobytes on Linux, bytes on macOS (getrusage(2) of each).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _statm(column: int) -> int:
    """Virtual (0) or resident (1) bytes of this process; the highest so far where there is no /proc."""
    try:
        return int((PROC / "self" / "statm").read_text().split()[column]) * resource.getpagesize()
    except OSError:
        return _highest()


def _address_space() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit


def _available() -> int:
    """Linux' own estimate of what new work can take; elsewhere all physical memory."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroups(proc: Path = PROC, mount: Path = CGROUP) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group that this process is in and that has a limit.

    Both versions of Linux' control groups; a limit holds for all groups below. File
    pages that nobody uses are given back on demand, so they do not count as used.
    """
    try:
        rows = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for _, controllers, path in rows:
        if not controllers:
            found += _limits(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _limits(mount / "memory", path, *names)
    return found


def _limits(mount: Path, path: str, limit_file: str, used_file: str, idle: str) -> Iterator[tuple[int, int]]:
    own = mount / path.lstrip("/")
    for group in (own, *own.parents):
        try:
            limit = (group / limit_file).read_text().strip()
            if limit != "max" and int(limit) < NO_LIMIT:
                kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(limit), int((group / used_file).read_text()) - int(kept.get(idle, 0))
        except (OSError, ValueError):  # a container may not see the groups it is in, only the mount
            pass
        if group == mount:
            break
