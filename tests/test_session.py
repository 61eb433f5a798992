"""A loop of one's own: what `shoal.Session` makes of a model, in the dtype that it has."""

import copy

import pytest
import torch
from laws.pool import Pool
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
