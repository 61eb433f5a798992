"""The schedules of `torch.distributed.pipelining`, and a stage as they see it.

Torch's stages bring the forward and backward passes, whole or split into inputs and weights. What is received has a
buffer and shape of its own for each micro-batch: torch's would have one shape for all, which it sends by pickle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from shoal.layouts.base import MicroBatch, shape_of
from shoal.layouts.stages import Stages
from shoal.wire.wire import Wire

SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
    "looped-bfs": schedules.ScheduleLoopedBFS,
    "interleaved-zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv-zero-bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


# (stage, what was received, micro-batch) -> what goes on to the next stage, or the loss
Compute = Callable[[int, Sequence[Tensor], MicroBatch], Any]


def filled(name: str, count: int, ranks: int, stages: int) -> int:
    """How many micro-batches a schedule runs where there are `count`: at least as many."""
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


@dataclass(frozen=True)
class _Message:
    """What a stage sends to or receives from `peer`, a rank of the wire. Schedules hand it on to `_start`."""

    wire: Wire
    tensor: Tensor
    peer: int
    sent: bool
    what: str


_torchs_start = schedules._batch_p2p


def _start(messages: list[Any], desc: str | None = None) -> list[Any]:
    """In the place of torch's function with which every schedule starts messages, all to and from one worker."""
    if not messages or not isinstance(messages[0], _Message):
        return _torchs_start(messages, desc)  # for other users of torch in this process
    first = messages[0]
    sent, received = ([each.tensor for each in messages if each.sent is way] for way in (True, False))
    if sent and received:
        return [first.wire.start_swap(sent, received, first.peer, first.what)]
    start = first.wire.start_send if sent else first.wire.start_receive
    return [start(each.tensor, each.peer, each.what) for each in messages]


schedules._batch_p2p = _start  # type: ignore[assignment]  # schedules only call `wait` on what it returns


class Stage(_PipelineStageBase):
    """One stage of this worker's: what it computes, and what it exchanges with its neighbours.

    A buffer lives from the call that receives into it to its use: only micro-batches on their way are held.
    `before_backward` is called with whether a backward pass is the last one of the step.
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

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []

    def get_fwd_recv_ops(self, chunk: int) -> list[Any]:
        """Receive the hidden states of a micro-batch."""
        if self.is_first:
            return []
        self._entering[chunk] = self._room(self.stage_index - 1, chunk)
        return [self._message(False, each, self.stage_index - 1) for each in self._entering[chunk]]

    def get_fwd_send_ops(self, chunk: int) -> list[Any]:
        """Send on what this stage has made of them."""
        if self.is_last:
            return []
        made, _ = self.fwd_cache[chunk]
        return [self._message(True, each.detach(), self.stage_index + 1) for each in made]

    def get_bwd_recv_ops(self, chunk: int) -> list[Any]:
        """Receive the gradient of what it has sent on."""
        if self.is_last:
            return []
        self._returning[chunk] = self._room(self.stage_index, chunk)[0]
        return [self._message(False, self._returning[chunk], self.stage_index + 1, "gradients")]

    def get_bwd_send_ops(self, chunk: int) -> list[Any]:
        """Send back the gradient of what came."""
        if self.is_first:
            return []
        grad = self.bwd_cache.pop(chunk)[0]
        assert grad is not None
        return [self._message(True, grad, self.stage_index - 1, "gradients")]

    def _room(self, stage: int, chunk: int) -> list[Tensor]:
        return self.stages.room(stage, *shape_of(self._micro_batches[chunk].inputs))

    def _message(self, sent: bool, tensor: Tensor, stage: int, what: str = "hidden states") -> _Message:
        return _Message(self.wire, tensor.contiguous(), self.stages.owners[stage], sent, what)

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
