"""Who this process is, from what torchrun, MPI, Slurm or our own launcher put into its environment."""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from shoal.config import RunConfig, resolve_threads, wanted_device
from shoal.errors import UserError
from shoal.system.devices import Machine, gpus, usable_cores
from shoal.wire.cards import TOKEN
from shoal.wire.rendezvous import Rendezvous

RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
SLURM_SIZES = "SLURM_TASKS_PER_NODE"  # of all nodes, as in 4(x2),3
STORE_FD = "SHOAL_STORE_FD"
SERVED = "TORCHELASTIC_USE_AGENT_STORE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
INTERFACES, NCCL_INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
PORTS = range(1, 1 << 16)


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an engine started this process as one of its workers. Raises UserError where a number is none."""
    return any(name in environ for name in RANK[:3]) or _is_srun(environ)


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what all workers have to say: it is no worker, or the first of its machine."""
    return not is_worker(environ) or not _first(environ, LOCAL_RANK)


def placement(environ: Mapping[str, str] = os.environ) -> Rendezvous:
    """What the engine says of this process. Raises UserError if rank, world size or address are missing or wrong."""
    rank, world_size = _first(environ, RANK), _first(environ, WORLD_SIZE)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        found = f"rank {rank} of {world_size}"
        raise UserError(
            "a worker's environment", found, f"set {RANK[0]} and {WORLD_SIZE[0]}, as torchrun does"
        )
    local_rank = _first(environ, LOCAL_RANK) or 0
    check_interfaces(environ.get(INTERFACES, ""))
    return Rendezvous(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=_local_size(environ, world_size),
        address=environ.get("MASTER_ADDR") or "127.0.0.1",
        port=_port(environ, world_size),
        store_fd=_number(environ, STORE_FD),
        served=environ.get(SERVED) == "True",
        attempt=_number(environ, RESTARTS) or 0,
        interface=environ.get(INTERFACES, "").partition(",")[0],
        token=environ.get(TOKEN, ""),
    )


def machine(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Machine:
    """What this machine has for the workers of `config`."""
    given = environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # one number for each nested level
    if not given and _is_srun(environ):
        given = environ.get("SLURM_CPUS_PER_TASK", "")
    threads = int(given) if given.isdecimal() and int(given) else None
    return Machine(usable_cores(), 0 if wanted_device(config) == "cpu" else gpus(), threads)


def threads_of(config: RunConfig, place: Rendezvous, environ: Mapping[str, str] = os.environ) -> int:
    """The threads of the worker at `place`. Where its engine does not say how many share the machine, all may."""
    return resolve_threads(config, place.local_size or place.world_size, machine(config, environ))


def use_interface(name: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo and NCCL use this network interface, unless the environment already names one for them."""
    environ.setdefault(INTERFACES, name)
    environ.setdefault(NCCL_INTERFACES, f"={name}")  # else NCCL reads it as a prefix


def check_interfaces(names: str) -> None:
    """Refuse network interfaces, by commas, that this machine lacks. Gloo would end in a traceback, or wait."""
    there = [name for _, name in socket.if_nameindex()]
    missing = [name for name in names.split(",") if name and name not in there]
    if missing:
        found = f"this machine has {', '.join(there) or 'none'}"
        raise UserError(f"{INTERFACES}={names}", found, "name one of them, or unset it")


def _local_size(environ: Mapping[str, str], world_size: int) -> int:
    """How many workers this machine has; 0 where the engine does not say."""
    size = _first(environ, LOCAL_SIZE)
    if size is not None:
        return size
    nodes = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get(SLURM_SIZES, "") if _is_srun(environ) else "")
    sizes = [int(tasks) for tasks, times in nodes for _ in range(int(times or 1))]
    node = _number(environ, "SLURM_NODEID") or 0
    return sizes[node] if node < len(sizes) else int(world_size == 1)


def _port(environ: Mapping[str, str], world_size: int) -> int:
    text = environ.get("MASTER_PORT", "")
    if text.isdecimal() and int(text) in PORTS:
        return int(text)
    if text in ("", "0"):
        if world_size == 1:
            return 0
        found, change = "no MASTER_PORT", "set MASTER_ADDR and MASTER_PORT on every rank"
    else:
        found = f"MASTER_PORT is {text!r}"
        change = "set it to a port (Kubernetes sets such a value for a service called master)"
    raise UserError("a worker's environment", found, change)


def _is_srun(environ: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environ and (_number(environ, "SLURM_NTASKS") or 1) > 1


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_number(environ, name) for name in names if name in environ), None)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """What a variable says; None where it is not set. Raises UserError where it is no whole number."""
    text = environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,9}", text.strip(), re.ASCII):
        raise UserError(
            "a worker's environment", f"{name} is {text!r}", "set it to a whole number, or unset it"
        )
    return int(text)
