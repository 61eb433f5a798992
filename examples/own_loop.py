"""A loop of one's own, data-parallel: a small network learns the sign of a sum.

`python examples/own_loop.py` and `torchrun --nproc-per-node 2 examples/own_loop.py` print the same losses.
"""

import torch
from torch import nn

import shoal

MICRO_BATCHES, ROWS, STEPS = 4, 16, 30


def micro_batch(step: int, v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of micro-batch (step, v): they follow from the two numbers alone."""
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step * MICRO_BATCHES + v))
    return x, (x.sum(1) > 0).long()


with shoal.Session(micro_batches=MICRO_BATCHES, exact=True) as session:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))
    model, optimizer = session.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(session.steps_done, STEPS):
        for v in session.share():
            x, y = (tensor.to(session.device) for tensor in micro_batch(step, v))
            session.backward(nn.functional.cross_entropy(model(x), y, reduction="sum"), labels=len(y))
        loss = session.step()
        if session.rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss:.7f}")
