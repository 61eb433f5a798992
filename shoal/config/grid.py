"""The sizes of the mesh: what is given of them, and what follows."""

from collections.abc import Iterator

from shoal.config.record import RunConfig
from shoal.errors import UserError


def resolve_grid(config: RunConfig, workers: int) -> dict[str, int]:
    """The size of each axis of the mesh on so many workers: {"replicate": 2, "shard": 2}.

    Raises UserError, with the equation in numbers, where the sizes do not multiply to the workers, and where a
    replica would be cut that must be whole.
    """
    layout = config.layout
    replicate, shard = layout.dp_replicate, layout.dp_shard
    if shard is None:
        cut = layout.zero_stage or replicate
        shard = _other(workers, replicate, "--dp-replicate") if cut else 1
    if replicate is None:
        replicate = _other(workers, shard, "--dp-shard")
    if replicate * shard != workers:
        found = f"{replicate} replicas x {shard} workers each = {replicate * shard}, and there are {workers} workers"
        asked = f"--dp-replicate {replicate} --dp-shard {shard}"
        raise UserError(asked, found, "give one of the two, or sizes that multiply to the workers")
    if shard > 1:
        for refusal in _must_be_whole(config, shard):
            raise UserError(*refusal)
    return {"replicate": replicate, "shard": shard}


def _must_be_whole(config: RunConfig, shard: int) -> Iterator[tuple[str, str, str]]:
    """What cannot be had of a replica that is cut over workers: what was asked, what was found, what to change."""
    train, strategy = config.train, config.strategy.name
    cut = f"{shard} workers hold a replica together"
    leave = "leave one of the two out"
    if train.exact:
        yield "--exact", f"{cut}, and sum gradients within it first", leave
    if train.compile:
        yield "--compile", f"{cut}, and gather each block as it computes", leave
    if train.optim == "muon":
        yield "--optim muon", f"{cut}, and it needs whole matrices", "take adamw, or " + leave
    if strategy in ("server", "async"):
        yield (
            f"--strategy {strategy}",
            f"{cut}, and servers hold whole parameters",
            "take another strategy, or " + leave,
        )


def _other(workers: int, size: int | None, flag: str) -> int:
    if workers % (size or 1):
        divisors = [each for each in range(1, workers + 1) if workers % each == 0]
        raise UserError(
            f"{flag} {size}",
            f"{workers} workers do not divide by it",
            f"take one of {', '.join(map(str, divisors))}, or another --nproc-per-node",
        )
    return workers // (size or 1)
