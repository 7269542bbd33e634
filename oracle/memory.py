"""Memory: how much there is, and giving back what is no longer used."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not say."""
    found = [free for free in (_of_the_machine(), _of_the_container()) if free is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_the_container() -> int | None:
    """What a control group (version 2) leaves; file pages that it counts can be given back."""
    with suppress(OSError, ValueError, StopIteration):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        files = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        return max(0, limit - used + files)
    return None


def release() -> None:
    """Return freed memory to the system: the C library keeps what a rung had, where the next one cannot use it."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
