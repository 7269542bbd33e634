"""Over how many devices and processes a run is spread. Framework-free, as `jaxgpt.settings`."""

from dataclasses import dataclass

from jaxgpt.errors import InputError

_MOST_PROCESSES = 100_000
_LONGEST_SILENCE = 86_400
"""A day: JAX takes 32 bits of seconds, and what is longer is a mistake."""


@dataclass(frozen=True)
class MeshSettings:
    """How a run's devices are arranged; every arrangement makes the same updates, up to rounding."""

    data_parallel: int | None = None
    """devices that share a batch's rows, each with all of the model; as many as there are unless given"""
    fsdp: int | None = None
    """devices that share the rows and the memory of weights and optimizer, gathered where used; 1 unless given"""
    tensor_parallel: int | None = None
    """devices that share every matrix product and its heads; 1 unless given"""

    def __post_init__(self) -> None:
        for name in ("data_parallel", "fsdp", "tensor_parallel"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ProcessSettings:
    """Which of several processes this is; where Slurm, Kubernetes or Open MPI started them, they say so."""

    distributed: bool = False
    """this is one of several processes of one run, all started with the same command"""
    coordinator_address: str = ""
    """HOST:PORT of process 0, where no Slurm, Kubernetes or Open MPI says it"""
    num_processes: int | None = None
    """how many there are; goes with --coordinator-address"""
    process_id: int | None = None
    """which this is, from 0; goes with --coordinator-address"""
    heartbeat_timeout: int = 100
    """seconds without a sign of life after which a process counts as dead and the others end"""

    def __post_init__(self) -> None:
        told = (bool(self.coordinator_address), self.num_processes is not None, self.process_id is not None)
        if any(told) and not (all(told) and self.distributed):
            raise InputError("--coordinator-address, --num-processes and --process-id go together, with --distributed")
        host, _, port = self.coordinator_address.rpartition(":")
        if self.coordinator_address and not (host and port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
            raise InputError(f"coordinator_address must be HOST:PORT, got {self.coordinator_address!r}")
        if self.num_processes is not None and not 1 <= self.num_processes <= _MOST_PROCESSES:
            raise InputError(f"num_processes must be in 1–{_MOST_PROCESSES:,}, got {self.num_processes}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise InputError(f"process_id must be in 0–{(self.num_processes or 0) - 1}, got {self.process_id}")
        if not 1 <= self.heartbeat_timeout <= _LONGEST_SILENCE:
            raise InputError(f"heartbeat_timeout must be in 1–{_LONGEST_SILENCE:,}, got {self.heartbeat_timeout}")
