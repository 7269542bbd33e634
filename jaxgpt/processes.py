"""Several processes that train one model: joining them, agreeing, and ending when one is gone.

Everything between them goes through JAX (`jax.distributed`, collectives). What only
one process can know (a signal, a full disk, free memory) must be agreed on before it
decides anything, or the others wait in a collective that never comes.
"""

import atexit
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from jaxgpt import heartbeat
from jaxgpt.errors import InputError
from jaxgpt.parallel_settings import ProcessSettings

GONE = f"another process of this run is gone or cannot be reached {heartbeat.AGAIN}"
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]oordination|[Hh]eartbeat")
"""What JAX says of a collective whose other side is not there."""
_PATIENCE = 300
"""Seconds that processes wait for each other at the start: a cluster does not start all of them at once."""
_SILENCE = 10
"""Seconds of waiting after which a person is told of it."""


def count() -> int:
    """How many processes train together."""
    # JAX is loaded and started only for those that joined others.
    jax: Any = sys.modules.get("jax")
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def first() -> bool:
    """This process writes: the only one, or number 0."""
    return number() == 0


def number() -> int:
    """Which of the processes this is."""
    jax: Any = sys.modules.get("jax")
    return jax.process_index() if count() > 1 else 0


def gathered(value: float) -> list[float]:
    """The value of every process, in their order; all must ask."""
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    # Not float32, which JAX would make of it: bytes of a memory are compared.
    halves = np.asarray([value], np.float64).view(np.uint32)
    return np.asarray(multihost_utils.process_allgather(halves)).reshape(-1).view(np.float64).tolist()


def any_of(flag: bool) -> bool:
    """Whether it is true in one of the processes; all must ask."""
    return any(gathered(float(flag)))


def told_by_first(value: float) -> float:
    """The value that the first process gives; all must ask."""
    return gathered(value)[0]


@contextmanager
def joined(settings: ProcessSettings) -> Generator[None]:
    """Be one of several processes inside and from then on, if the settings say so.

    Raises:
        InputError: nothing tells which process this is, or another one is gone. Whoever
            catches it, or any other error, leaves by `end`.
    """
    if not settings.distributed:
        yield
        return
    import jax

    if not jax.distributed.is_initialized():
        _join(settings)
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if lost(error):
            raise InputError(GONE) from error
        raise


def lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is not there any more."""
    # Reading an array that a collective failed to make raises a plain ValueError with the same text.
    return count() > 1 and type(error).__name__ in ("JaxRuntimeError", "ValueError") and bool(_LOST.search(str(error)))


def end(code: int) -> None:
    """Leave a failed process that trains with others: a normal exit would wait for them, and they wait for it."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _join(settings: ProcessSettings) -> None:
    import jax

    # The loop takes signals itself, and all processes agree on the step to save.
    jax.config.update("jax_enable_preemption_service", False)
    told = threading.Timer(_SILENCE, _tell_of_waiting, [settings.coordinator_address])
    told.daemon = True
    told.start()
    until = time.monotonic() + _PATIENCE
    try:
        if settings.coordinator_address and settings.process_id:
            _reach(settings.coordinator_address, until)
        _initialize(settings, until)
    finally:
        told.cancel()
    atexit.register(heartbeat.Heartbeat(settings.heartbeat_timeout).leave)


def _initialize(settings: ProcessSettings, until: float) -> None:
    import jax

    # JAX warns where it sees Kubernetes and has no package to ask it with.
    with warnings.catch_warnings(record=True, action="always") as warned:
        try:
            jax.distributed.initialize(
                settings.coordinator_address or None,
                settings.num_processes,
                settings.process_id,
                heartbeat_timeout_seconds=settings.heartbeat_timeout + heartbeat.LATER,
                initialization_timeout=max(1, int(until - time.monotonic())),
            )
        except ValueError as error:
            raise InputError(
                "--distributed: neither Slurm, Kubernetes nor Open MPI started this process "
                f"({_in_a_line(warned[-1].message if warned else error)}); give "
                "--coordinator-address HOST:PORT, --num-processes and --process-id"
            ) from None
        except Exception as error:  # of Kubernetes' client, too
            kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            raise InputError(f"--distributed: {kind}{_in_a_line(error)}") from None


def _in_a_line(said: object) -> str:
    return " ".join(str(said).split())


def _tell_of_waiting(address: str) -> None:
    where = f" at {address}" if address else ""
    print(f"waiting{where} for the other processes of this run, {_PATIENCE} s at most", file=sys.stderr, flush=True)


def _reach(address: str, until: float) -> None:
    """Wait for the first process, which JAX waits for as well, but then it aborts."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until or isinstance(error, UnicodeError):
                raise InputError(
                    f"--coordinator-address {address} cannot be reached ({error}); process 0 must "
                    "run there, with the same address"
                ) from None
        time.sleep(0.5)
