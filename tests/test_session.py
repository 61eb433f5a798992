"""A loop of one's own: what `shoal.Session` makes of a model, in the dtype that it has."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.pool import Pool
from laws.ports import free_port
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from shoal.errors import UserError

MICRO_BATCHES, STEPS = 512, 3


def micro_batch(step: int, v: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + v)
    x = torch.randn(2, 8, generator=generator) + 1
    return x, (x.sum(1) > 0).long()


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def loss_of(model: nn.Module, step: int, v: int) -> Tensor:
    x, y = micro_batch(step, v)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y, reduction="sum")


def by_session(dtype: torch.dtype) -> list[list[Tensor]]:
    """The parameters before and after each step."""
    model = model_of(dtype)
    with shoal.Session(micro_batches=MICRO_BATCHES) as session:
        model, optimizer = session.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        held = [[p.detach().clone() for p in model.parameters()]]
        for step in range(STEPS):
            for v in session.share():
                session.backward(loss_of(model, step, v), labels=2)
            session.step()
            held.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.state
    return held


def by_hand(dtype: torch.dtype) -> list[list[Tensor]]:
    """The same by plain torch, with gradients added up in float64."""
    model = model_of(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    held = [[p.detach().clone() for p in model.parameters()]]
    for step in range(STEPS):
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
        for v in range(MICRO_BATCHES):
            model.zero_grad()
            loss_of(model, step, v).backward()
            for total, p in zip(sums, model.parameters(), strict=True):
                total += p.grad
        for total, p in zip(sums, model.parameters(), strict=True):
            p.grad = (total / (2 * MICRO_BATCHES)).to(dtype)
        optimizer.step()
        held.append([p.detach().clone() for p in model.parameters()])
    return held


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_trained_in_the_dtype_it_has(pool: Pool, dtype: torch.dtype) -> None:
    ours, theirs = pool.alone(by_session, dtype).value, by_hand(dtype)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def refused() -> str:
    model = model_of(torch.float16)
    before = copy.deepcopy(model.state_dict())
    with shoal.Session(micro_batches=1) as session, pytest.raises(UserError) as error:
        session.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(error.value)


def test_float16_parameters_are_refused(pool: Pool) -> None:
    said = pool.alone(refused).value
    assert said.startswith("shoal.Session: 0.weight is float16")
    assert "hold parameters in float32" in said


def by_program(
    folder: Path, workers: int, stop_after: int, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a loop of one's own under so many workers, and the model that it saves."""
    folder.mkdir(exist_ok=True)
    program = [sys.executable, str(Path(__file__).with_name("session_loop.py"))]
    words = [str(folder), str(stop_after), json.dumps(settings | {"threads": 1})]
    port = free_port()
    common = {**os.environ, "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [*program, *words],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert not any(process.returncode for process in started), said
    saved = load_file(folder / f"checkpoint-{stop_after}" / "model" / "model.safetensors")
    return json.loads((folder / "losses.json").read_text()), saved


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"exact": True}], ids=["plain", "exact"])
def test_a_loop_of_ones_own_follows_one_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    losses, alone = by_program(tmp_path / "alone", 1, 6)
    found, model = by_program(tmp_path / "two", 2, 6, **settings)
    assert found == pytest.approx(losses, rel=1e-12)
    near(model, alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "local", "sync_every": "2"},
        {"strategy": "diloco", "sync_every": "2", "codec": "int8"},
        {"strategy": "gossip"},
    ],
    ids=lambda settings: settings["strategy"],
)
def test_a_loop_of_ones_own_under_a_strategy_goes_on_exactly(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    together, _ = by_program(tmp_path / "allreduce", 2, 6)
    found, whole = by_program(tmp_path / "whole", 2, 6, **settings)
    assert found[0] == pytest.approx(together[0], rel=1e-12)  # before any update
    assert found != pytest.approx(together, rel=1e-6)  # another way of training
    by_program(tmp_path / "resumed", 2, 3, **settings)
    _, model = by_program(tmp_path / "resumed", 2, 6, **settings)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in model.items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "server"}, "strategy=server"),
        ({"strategy": "demo"}, "strategy=demo"),
        ({"tp": 2}, "a replica that is cut"),
        ({"strategy": "local", "codec": "int8", "topology": "ring"}, "topology"),
    ],
)
def test_what_a_session_cannot_have_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        shoal.Session(4, **settings)
