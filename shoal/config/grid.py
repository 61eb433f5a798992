"""The sizes of the mesh: what is given of them, and what follows."""

from shoal.config.record import RunConfig
from shoal.errors import UserError


def resolve_grid(config: RunConfig, workers: int) -> dict[str, int]:
    """The size of each axis of the mesh on so many workers: {"replicate": 2, "shard": 2}.

    Raises UserError, with the equation in numbers, where the sizes do not multiply to the workers.
    """
    layout = config.layout
    replicate, shard = layout.dp_replicate, layout.dp_shard
    if shard is None:
        shard = _other(workers, replicate, "--dp-replicate") if layout.zero_stage else 1
    if replicate is None:
        replicate = _other(workers, shard, "--dp-shard")
    if replicate * shard != workers:
        found = f"{replicate} replicas x {shard} workers each = {replicate * shard}, and there are {workers} workers"
        asked = f"--dp-replicate {replicate} --dp-shard {shard}"
        raise UserError(asked, found, "give one of the two, or sizes that multiply to the workers")
    return {"replicate": replicate, "shard": shard}


def _other(workers: int, size: int | None, flag: str) -> int:
    if workers % (size or 1):
        divisors = [each for each in range(1, workers + 1) if workers % each == 0]
        raise UserError(
            f"{flag} {size}",
            f"{workers} workers do not divide by it",
            f"take one of {', '.join(map(str, divisors))}, or another --nproc-per-node",
        )
    return workers // (size or 1)
