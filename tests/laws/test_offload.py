"""Where the optimizer steps, and where a replica's parts lie, changes nothing.

On a CPU host and device are one memory, which is refused; here it is not, and what is copied is as beside a GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.layouts import LAYOUTS, STEPS, follow_in_pieces, resume_all, together
from laws.models import ModelTask
from laws.pool import Pool
from laws.rows import RowsTask
from laws.worlds import first_difference, follow, run_of

from shoal.errors import UserError
from shoal.observe.memory import COPIES, Report
from shoal.optim import offload
from shoal.wire.mesh import Mesh

TASK = RowsTask("stacked", dropout=0.1)


def taken(mesh: Mesh, function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function` where an offload on a CPU is not refused."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(offload, "check", lambda *_: None)
        return function(mesh, *args, **kwargs)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"precision": "64-true"},
    "sgd": {"optim": "sgd"},
    "muon": {"optim": "muon"},
    "adamw-8bit": {"optim": "adamw-8bit"},
    "bf16-true": {"precision": "bf16-true"},
}


def both_ways(mesh: Mesh, folder: str) -> list[list[Any]]:
    """Of each optimizer a run without, and one with its state on the host."""
    ways = {"here": {}, "there": {"offload": "optimizer"}}
    return [
        [
            follow(
                mesh,
                "allreduce",
                TASK,
                output_dir=f"{folder}/{name}-{way}",
                **STEPS | settings | more,
            )
            for way, more in ways.items()
        ]
        for name, settings in OPTIMIZERS.items()
    ]


def test_every_optimizer_steps_alike(pool: Pool, tmp_path: Path) -> None:
    for on_rank in pool.world(2, taken, both_ways, str(tmp_path)):
        for name, (here, there) in zip(OPTIMIZERS, on_rank, strict=True):
            assert first_difference(here.tensors, there.tensors) is None, name
            assert here.losses == there.losses, name


def test_a_strategy_that_writes_parameters_is_followed(pool: Pool, tmp_path: Path) -> None:
    steps = {**STEPS, "global_batch_size": 16, "max_steps": 6}
    runs = [
        pool.world(2, taken, follow, "diloco", TASK, output_dir=str(tmp_path / way), **steps, offload=way)
        for way in ("none", "optimizer")
    ]
    for here, there in zip(*runs, strict=True):
        assert first_difference(here.tensors, there.tensors) is None


PARAMETERS = {name: LAYOUTS[name] for name in ("zero3", "hybrid")}


@pytest.mark.parametrize("layout", PARAMETERS)
def test_offloaded_parameters_follow_one_process(pool: Pool, layout: str, tmp_path: Path) -> None:
    ranks, island, settings = PARAMETERS[layout]
    task = ModelTask("gpt2", dropout=0.1)
    (alone,) = pool.world(1, follow, "allreduce", task, output_dir=str(tmp_path / "alone"), **STEPS)
    moved = {**STEPS, **settings, "offload": "parameters", "output_dir": str(tmp_path / "cut")}
    cut = pool.world(ranks, taken, follow_in_pieces, "allreduce", task, **moved)
    whole = [together([held[step] for _, held, _ in cut[:island]]) for step in range(4)]
    assert first_difference(alone.tensors, whole, 1e-10) is None
    assert np.allclose(cut[0][0], alone.losses, rtol=1e-11)


def policies(mesh: Mesh, **settings: Any) -> set[bool]:
    """Whether FSDP is to keep the parameters of each part of the model on the host."""
    placed = run_of(mesh, "allreduce", TASK, **STEPS, **settings).replica.placed
    groups = [group for part in placed.parts for group in part._get_fsdp_state()._fsdp_param_groups]
    return {p.offload_to_cpu for group in groups for p in group.fsdp_params}


def test_every_part_is_offloaded_where_it_is_asked_for(pool: Pool) -> None:
    """On a CPU nothing else shows it."""
    for moved in ("none", "parameters"):
        assert pool.world(2, taken, policies, zero_stage=3, offload=moved) == [{moved != "none"}] * 2


def gradients_stay(mesh: Mesh) -> bool:
    """Whether what FSDP is given as a gradient is the bucket's own memory, though its mesh is of another device."""
    replica = run_of(mesh, "allreduce", TASK, **STEPS, zero_stage=3).replica
    found = []
    for bucket in replica.buckets:
        for piece in bucket.pieces:
            of_mesh: Any = piece.source.device_mesh
            of_mesh._device_type = "meta"
            wrapped: Any = piece.wrap(bucket.views[piece.local])
            found.append(wrapped.to_local().data_ptr() == bucket.views[piece.local].data_ptr())
    return all(found)


def test_gradients_stay_on_the_host(pool: Pool) -> None:
    assert pool.world(2, gradients_stay) == [True, True]


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8: state that lay on the host goes on where the optimizer is, and the other way round."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "alone": (1, {}),
        "state": (1, {"offload": "optimizer"}),
        "zero3": (2, {"zero_stage": 3, "offload": "parameters"}),
    }
    (whole,) = pool.world(1, follow, "allreduce", TASK, output_dir=str(tmp_path / "whole"), **STEPS)
    saved = []
    for name, (ranks, settings) in layouts.items():
        first = {"output_dir": str(tmp_path / name), "save_steps": 3, "stop_after": 3}
        pool.world(ranks, taken, follow, "allreduce", TASK, **STEPS, **settings, **first)
        saved.append(str(tmp_path / name / "checkpoint-3"))
    for name, (ranks, settings) in layouts.items():
        folder = str(tmp_path / f"from-{name}")
        on_rank = pool.world(ranks, taken, resume_all, TASK, saved, folder, **settings)
        for number, start in enumerate(saved):
            found = together([each[number][0] for each in on_rank])
            trained = {tensor: found[tensor] for tensor in whole.tensors[-1]}
            assert first_difference([whole.tensors[-1]], [trained], 1e-10) is None, (name, start)


def apart(mesh: Mesh, folder: str) -> tuple[bool, Report]:
    """Whether state and copies share no memory with the replica; and what a step held."""
    run = run_of(mesh, "allreduce", TASK, **STEPS, offload="optimizer", output_dir=folder, memory_report=True)
    run.folder.mkdir()
    for step in range(2):
        with run.memory.watching(step):
            taken = run.replica.gradients(run.batches.at(step))
            run.sync.step(run.replica, taken)
    own = {p.untyped_storage().data_ptr() for _, p in run.replica.params}
    others = {piece.local.untyped_storage().data_ptr() for piece in run.replica.updated}
    assert run.memory.report is not None
    return not own & others and len(others) == len(own), run.memory.report


def test_what_the_host_holds_is_told(pool: Pool, tmp_path: Path) -> None:
    ((is_apart, memory),) = pool.world(1, taken, apart, str(tmp_path / "run"))
    assert is_apart
    for part in ("parameters", "gradients", "optimizer state", COPIES):
        assert memory[part]["bytes"] == memory[part]["formula"], part
    assert (memory[COPIES]["bytes"] or 0) > 0


def test_it_is_refused_where_the_processor_computes() -> None:
    for moved in ("optimizer", "parameters"):
        with pytest.raises(UserError, match=f"--offload {moved}: the processor computes"):
            offload.check(moved, torch.device("cpu"))
        offload.check(moved, torch.device("cuda"))
    offload.check("none", torch.device("cpu"))
