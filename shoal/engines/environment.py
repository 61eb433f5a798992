"""Who this process is, from what torchrun, MPI, Slurm or our own launcher put into its environment."""

import os
from collections.abc import Mapping

from shoal.errors import UserError
from shoal.placement import Placement

RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
STORE_FD = "SHOAL_STORE_FD"
SERVED = "TORCHELASTIC_USE_AGENT_STORE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an engine started this process as one of its workers."""
    return (
        "RANK" in environ or "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ or _is_srun(environ)
    )


def placement(environ: Mapping[str, str] = os.environ) -> Placement:
    """What the engine says of this process. Raises UserError if rank, world size or address are missing."""
    rank, world_size = _number(environ, RANK), _number(environ, WORLD_SIZE)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        found = f"rank {rank} of {world_size}"
        raise UserError(
            "a worker's environment", found, f"set {RANK[0]} and {WORLD_SIZE[0]}, as torchrun does"
        )
    if world_size > 1 and not int(environ.get("MASTER_PORT", 0)):
        raise UserError(
            "a worker's environment", "no MASTER_PORT", "set MASTER_ADDR and MASTER_PORT on every rank"
        )
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, LOCAL_RANK) or 0,
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environ.get("MASTER_PORT", 0)),
        store_fd=int(environ[STORE_FD]) if STORE_FD in environ else None,
        served=environ.get(SERVED) == "True",
        attempt=int(environ.get(RESTARTS, 0)),
    )


def _is_srun(environ: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((int(environ[name]) for name in names if name in environ), None)
