"""The schedules of `torch.distributed.pipelining`, and a stage as they see it.

Of torch's stages it takes the forward and backward passes, whole or split into inputs and weights. What is received
has its own buffer and shape for each micro-batch: torch's would have one shape for all, told by pickle.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from shoal.layouts.base import MicroBatch, shape_of
from shoal.layouts.stages import Stages
from shoal.wire.wire import Exchange, Wire

SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
    "looped-bfs": schedules.ScheduleLoopedBFS,
    "interleaved-zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv-zero-bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


class _Message(dist.P2POp):
    """A message between two stages, which is to go over a wire."""

    def __init__(self, wire: Wire, kind: Any, tensor: Tensor, rank: int) -> None:
        super().__init__(kind, tensor, group=wire.group, group_peer=rank)
        self.wire = wire

    def __new__(cls, wire: Wire, kind: Any, tensor: Tensor, rank: int) -> "_Message":
        return object.__new__(cls)

    def start(self) -> Exchange:
        """Begin to send or to receive it alone."""
        start = self.wire.start_send if self.op is dist.isend else self.wire.start_receive
        return start(self.tensor, self.group_peer)


def _start(messages: list[_Message], desc: str | None = None) -> list[Exchange]:
    """Begin to exchange: one by one what goes one way, at once what goes both ways, as torch does."""
    if len({message.op for message in messages}) > 1:
        return [messages[0].wire.start_batch("hidden states and gradients", messages)]
    return [message.start() for message in messages]


schedules._batch_p2p = _start  # type: ignore[assignment]  # torch's would pass by the wire; it asks them to wait
# (stage, what came, micro-batch) -> what goes on to the next stage, or the loss
Compute = Callable[[int, Sequence[Tensor], MicroBatch], Any]


def filled(name: str, count: int, ranks: int, stages: int) -> int:
    """How many micro-batches a schedule takes where there are `count`."""
    if name in ("1f1b", "dualpipev"):
        return max(count, stages)
    if name in ("interleaved-1f1b", "interleaved-zero-bubble"):
        return next(more for more in range(count, 2 * count + 1) if more % max(1, more // ranks) == 0)
    return count


def make(name: str, own: list["Stage"], count: int) -> Any:
    """A schedule of so many micro-batches: the targets of the last stage are what it multiplies each loss by."""
    kind = SCHEDULES[name]
    mine = own if issubclass(kind, schedules.PipelineScheduleMulti) else own[0]
    return kind(mine, count, loss_fn=lambda loss, weight: loss * weight, scale_grads=False)


class Stage(_PipelineStageBase):
    """One stage of this worker's: what it computes, and what it exchanges with its neighbours.

    Memory is taken when something is to be received and given back once it is used: only the micro-batches on their
    way are held. `before_backward` is told whether a pass is the last one of the step.
    """

    def __init__(
        self,
        stages: Stages,
        index: int,
        wire: Wire,
        compute: Compute,
        before_backward: Callable[[bool], None],
    ) -> None:
        super().__init__(
            _Part(stages.model, index, compute), index, len(stages.owners), stages.device, wire.group
        )
        self.wire = wire
        self.stages = stages
        self.before_backward = before_backward
        self._stage_meta.inputs = (None,)  # type: ignore[assignment]  # how many of them have a gradient
        self.args_recv_info = {0: ()}  # where torch looks for stages that are no neighbours
        self._micro_batches: Sequence[MicroBatch] = ()
        self._entering: dict[int, list[Tensor]] = {}
        self._returning: dict[int, Tensor] = {}

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A step on these micro-batches."""
        self._micro_batches, self.chunks = micro_batches, len(micro_batches)
        self.has_backward = True
        self.clear_runtime_states()

    def is_apart(self, stage: int) -> bool:
        """Whether a neighbour is there, and another worker's."""
        return stage in range(self.num_stages) and self.stages.owners[stage] != self.group_rank

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None: ...

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None: ...

    def _create_grad_recv_info(self, act_send_info: dict[Any, Any]) -> tuple[Any, ...]:
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def get_fwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        """Receive the hidden states of a micro-batch."""
        if self.is_first:
            return []
        self._entering[chunk] = self._room(self.stage_index - 1, chunk)
        return [self._op(dist.irecv, each, self.stage_index - 1) for each in self._entering[chunk]]

    def get_fwd_send_ops(self, chunk: int) -> list[dist.P2POp]:
        """Send on what this stage has made of them."""
        if self.is_last:
            return []
        made, _ = self.fwd_cache[chunk]
        return [self._op(dist.isend, each.detach(), self.stage_index + 1) for each in made]

    def get_bwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        """Receive the gradient of what it has sent on."""
        if self.is_last:
            return []
        self._returning[chunk] = self._room(self.stage_index, chunk)[0]
        return [self._op(dist.irecv, self._returning[chunk], self.stage_index + 1)]

    def get_bwd_send_ops(self, chunk: int) -> list[dist.P2POp]:
        """Send back the gradient of what came."""
        if self.is_first:
            return []
        grad = self.bwd_cache.pop(chunk)[0]
        assert grad is not None
        return [self._op(dist.isend, grad, self.stage_index - 1)]

    def _room(self, stage: int, chunk: int) -> list[Tensor]:
        return self.stages.room(stage, *shape_of(self._micro_batches[chunk].inputs))

    def _op(self, kind: Any, tensor: Tensor, stage: int) -> dist.P2POp:
        return _Message(self.wire, kind, tensor.contiguous(), self.stages.owners[stage])

    def set_local_fwd_input(self, made: Any, chunk: int) -> None:
        """Take hidden states from the stage before, which is this worker's too."""
        self._entering[chunk] = [each.detach() for each in (made if isinstance(made, tuple) else (made,))]

    def set_local_bwd_input(self, grads: tuple[Tensor | None, ...], chunk: int) -> None:
        """Take their gradient from the stage behind, which is this worker's too."""
        assert grads[0] is not None
        self._returning[chunk] = grads[0]

    def _retrieve_recv_activations(self, chunk: int) -> tuple[Tensor, ...]:
        hidden, *state = self._entering.pop(chunk)
        return (hidden.requires_grad_(), *state)

    def _retrieve_recv_grads(self, chunk: int) -> tuple[Tensor | None, ...]:
        return (self._returning.pop(chunk), *[None] * self.stages.draws)

    def forward_one_chunk(
        self, chunk: int, args: Any = (), kwargs: Any = None, save_forward_output: bool = False
    ) -> Any:
        """The forward pass of a micro-batch."""
        return super().forward_one_chunk(
            chunk, (), {"micro_batch": self._micro_batches[chunk]}, save_forward_output
        )

    def backward_one_chunk(
        self, chunk: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """The backward pass of a micro-batch, or the part of it that the stage before waits for."""
        self.before_backward(last_backward)
        super().backward_one_chunk(chunk, loss, full_backward, last_backward)


class _Part(nn.Module):
    """A stage as a module: a split backward pass asks for the parameters that it may meet."""

    def __init__(self, model: nn.Module, index: int, compute: Compute) -> None:
        super().__init__()
        self.model = model
        self.index = index
        self.compute = compute

    def forward(self, *received: Tensor, micro_batch: MicroBatch) -> Any:
        """What goes on to the next stage, or the loss."""
        return self.compute(self.index, received, micro_batch)
