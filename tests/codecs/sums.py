"""What the ranks of a world do in the tests of sums, and what they bring back."""

from dataclasses import dataclass
from typing import Any

import torch
from cases import SHAPES, values
from torch import Tensor

from shoal.codecs.sums import EncodedSums
from shoal.config import StrategyConfig
from shoal.wire.mesh import Mesh

PADDING = 3.5
NUMEL = 354
Tensors = list[Tensor]


def gradient(rank: int, step: int, numel: int = NUMEL, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a rank brings to the sum of a step."""
    return values(numel, step, rank + 1, dtype=dtype)


@dataclass
class Summed:
    """What came of some steps on one rank: the sums, the bytes of each step, and what is remembered."""

    sums: Tensors
    sent: list[int]
    state: dict[str, Tensor]


def shapes_of(numel: int) -> list[torch.Size]:
    """Those of `SHAPES`, or a vector."""
    return list(map(torch.Size, SHAPES if numel == NUMEL else ((numel,),)))


def sum_steps(
    mesh: Mesh,
    options: StrategyConfig,
    steps: range,
    *,
    numels: tuple[int, ...] = (NUMEL,),
    dtype: torch.dtype = torch.float64,
    states: list[dict[str, Tensor]] | None = None,
    poisoned: int | None = None,
    undone: bool = False,
) -> Summed:
    """Sum the gradients of each step, a tensor for each of `numels`, as a strategy does: start all, then end all.

    With `undone` every sum is formed twice, and rolled back in between.
    """
    wire = mesh.wire("world")
    exchange = EncodedSums(options, wire)
    if states is not None:
        exchange.load_state_dict(states)
    sums, sent = [], []
    for step in steps:
        before = wire.bytes_sent
        tensors = [torch.cat([gradient(mesh.rank, step, n, dtype), torch.full((2,), PADDING, dtype=dtype)])
                   for n in numels]  # fmt: skip
        if step == poisoned and mesh.rank == 0:
            tensors[0][7] = torch.nan
        if undone:
            _sum(exchange, [tensor.clone() for tensor in tensors], numels)
            exchange.rollback()
        _sum(exchange, tensors, numels)
        exchange.commit()
        sent.append(wire.bytes_sent - before)
        if options.codec != "none" and step >= options.codec_warmup:
            assert all((tensor[-2:] == PADDING).all() for tensor in tensors), "padding is left as it is"
        sums.append(torch.cat([tensor[:-2] for tensor in tensors]))
    return Summed(sums, sent, {name: t.clone() for name, t in exchange.state_dict().items()})


def _sum(exchange: EncodedSums, tensors: Tensors, numels: tuple[int, ...]) -> None:
    started = [exchange.start_sum(str(i), tensor, shapes_of(numels[i])) for i, tensor in enumerate(tensors)]
    for work in [finish() for finish in started]:
        work.wait()


def many(mesh: Mesh, cases: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Summed]:
    """Several `sum_steps` in one world."""
    return [sum_steps(mesh, *given, **named) for given, named in cases]


def waiting(states: list[dict[str, Tensor]], numel: int = NUMEL) -> Tensor:
    """All that the ranks still owe: their residuals, and those of the chunks."""
    own = torch.stack([state["codec/0/residual"] for state in states]).sum(0)
    if "codec/0/server.residual" not in states[0]:
        return own
    return own + torch.cat([state["codec/0/server.residual"] for state in states])[:numel]
