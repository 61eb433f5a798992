"""PowerSGD against torch's own hook, from the same factors and residuals on."""

from dataclasses import dataclass

import pytest
import torch
from cases import values
from laws.pool import Pool
from torch import Tensor

from shoal.codecs.sums import EncodedSums
from shoal.config import StrategyConfig
from shoal.wire.mesh import Mesh

SHAPES = [torch.Size((20, 12)), torch.Size((7,)), torch.Size((9, 30)), torch.Size((4, 4))]
NUMEL = sum(shape.numel() for shape in SHAPES)
EXACT, STEPS = 2, 12  # the hook wants two steps before it begins


@dataclass
class Bucket:
    """What the hook asks of DDP's bucket."""

    flat: Tensor

    def buffer(self) -> Tensor:
        return self.flat

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([shape.numel() for shape in SHAPES])
        return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def both(mesh: Mesh, rank: int) -> float:
    """Run both for some steps; returns the largest difference."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs

    state = torchs.PowerSGDState(mesh.group, rank, start_powerSGD_iter=EXACT, random_seed=3)
    exchange = EncodedSums(StrategyConfig(codec="powersgd", rank=rank), mesh.wire("world"))
    worst = 0.0
    for step in range(STEPS):
        own = values(NUMEL, step, mesh.rank)
        theirs = torchs.powerSGD_hook(state, Bucket(own.clone())).wait()
        if step > EXACT:
            exchange.start_sum("0", own, SHAPES)().wait()
            worst = max(worst, (own / mesh.world_size - theirs).abs().max().item())
        elif step == EXACT:
            factors = torch.cat([q.reshape(-1) for q in state.q_memory_dict[0].split([12 * rank, 30 * rank])])
            exchange.load_state_dict(
                [{"codec/0/factors": factors.clone(), "codec/0/residual": state.error_dict[0].clone()}]
                * mesh.world_size
            )
    return worst


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ours_equals_torchs(pool: Pool, ranks: int, rank: int) -> None:
    assert max(pool.world(ranks, both, rank)) < 1e-12
