"""The sizes of the mesh: what is given of them, and what follows."""

from collections.abc import Iterator

from shoal.config.layout import ONE_STAGE, SPLIT, THERE_AND_BACK, LayoutConfig
from shoal.config.record import RunConfig
from shoal.errors import UserError


def resolve_grid(config: RunConfig, workers: int) -> dict[str, int]:
    """The size of each axis of the mesh on so many workers: {"replicate": 2, "shard": 2, "pipeline": 1, ...}.

    Raises UserError, with the equation in numbers, where the sizes do not multiply to the workers, and where a
    replica would be cut that must be whole.
    """
    grid = grid_sizes(config, workers)
    for refusal in (*_no_pipeline(config.layout, grid), *_no_offload(config.layout, grid)):
        raise UserError(*refusal)
    if grid["replicate"] < workers:
        for refusal in _must_be_whole(config, workers // grid["replicate"]):
            raise UserError(*refusal)
    return grid


def grid_sizes(config: RunConfig, workers: int) -> dict[str, int]:
    """`resolve_grid`, whatever else the run asks for."""
    layout = config.layout
    team = {"pipeline": layout.pp, "context": layout.cp, "tensor": layout.tp}
    flags = {"--pp": layout.pp, "--cp": layout.cp, "--tp": layout.tp}
    teams = _divide(
        workers, team_size(config), " ".join(f"{f} {size}" for f, size in flags.items() if size > 1)
    )
    replicate, shard = layout.dp_replicate, layout.dp_shard
    if shard is None:
        cut = layout.zero_stage or replicate
        shard = _divide(teams, replicate or 1, f"--dp-replicate {replicate}") if cut else 1
    if replicate is None:
        replicate = _divide(teams, shard, f"--dp-shard {shard}")
    if replicate * shard != teams:
        there = "workers" if teams == workers else f"teams of {workers // teams} workers"
        found = f"{replicate} replicas x {shard} each = {replicate * shard}, and there are {teams} {there}"
        asked = f"--dp-replicate {replicate} --dp-shard {shard}"
        raise UserError(asked, found, "give one of the two, or sizes that multiply to the workers")
    return {"replicate": replicate, "shard": shard, **team}


def team_size(config: RunConfig) -> int:
    """How many workers compute a micro-batch together."""
    return config.layout.tp * config.layout.pp * config.layout.cp


def _no_pipeline(layout: LayoutConfig, grid: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    """What a pipeline is refused with, as (asked, found, change)."""
    given = {"pp_schedule": layout.pp_schedule, "pp_virtual_stages": layout.pp_virtual_stages}
    for name, value in given.items():
        if value and layout.pp == 1:
            yield f"--{name.replace('_', '-')} {value}", "there is no pipeline", "add --pp, or leave it out"
    schedule, stages = layout.schedule, layout.stages_per_worker
    wrong = {
        "one stage": schedule in ONE_STAGE and stages > 1,
        "two stages": schedule in THERE_AND_BACK and stages != 2,
        "several stages": schedule not in ONE_STAGE and stages == 1,
    }
    for right in (right for right, is_wrong in wrong.items() if is_wrong):
        found = f"{schedule} has {right} on each worker"
        yield f"--pp-virtual-stages {stages}", found, "leave it out, or take another --pp-schedule"
    if layout.pp > 1 and stages > 1 and grid["shard"] * grid["context"] > 1:
        found = f"{stages} stages on each worker, and FSDP2 cannot tell which backward pass is a stage's last"
        yield f"--pp-schedule {schedule}", found, "take gpipe or 1f1b, or leave --dp-shard out"
    if layout.tp > 1 and schedule in SPLIT:
        found = "it splits backward passes, and those of a team exchange what is of both halves at once"
        change = "take gpipe, 1f1b, interleaved-1f1b or looped-bfs, or leave --tp out"
        yield f"--pp-schedule {schedule}", found, change


def _no_offload(layout: LayoutConfig, grid: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    """Where offloaded parameters would not come back to the device, as (asked, found, change)."""
    at_stage_3 = grid["shard"] * grid["context"] > 1 and layout.zero_stage in (None, 3)
    if layout.offload == "parameters" and not at_stage_3:
        found = "parameters are brought to the GPU block by block where ZeRO cuts them, at stage 3 alone"
        yield (
            "--offload parameters",
            found,
            "add --strategy zero3 on 2 workers or more, or take optimizer",
        )


def _must_be_whole(config: RunConfig, island: int) -> Iterator[tuple[str, str, str]]:
    """What needs a whole replica on each worker, as (asked, found, change)."""
    train = config.train
    cut = f"{island} workers hold a replica together"
    leave = "leave one of the two out"
    if train.exact:
        yield "--exact", f"{cut}, and sum gradients within it first", leave
    if train.compile:
        yield "--compile", f"{cut}, and talk to each other as it computes", leave
    if train.optimizer.whole_matrices:
        yield f"--optim {train.optim}", f"{cut}, and it needs whole matrices", "take adamw, or " + leave
    if config.eval.quantize != "none":
        yield (
            f"--quantize {config.eval.quantize}",
            f"{cut}, and whole weights are quantised",
            "add --dp-shard 1",
        )
    if config.strategy.quorum is not None:
        yield (
            f"--quorum {config.strategy.quorum}",
            f"{cut}, whose servers would each go on without other workers",
            leave,
        )


def _divide(workers: int, size: int, asked: str) -> int:
    """Check that `size` divides the workers. Raises UserError that names what was `asked`."""
    if workers % size:
        divisors = ", ".join(str(each) for each in range(1, workers + 1) if workers % each == 0)
        found, change = (
            f"{workers} workers do not divide by {size}",
            f"take one of {divisors}, or another --nproc-per-node",
        )
        raise UserError(asked, found, change)
    return workers // size
