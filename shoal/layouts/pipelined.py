"""Pipeline-parallel: each worker of a pipeline holds some of the layers, and micro-batches run through all of them.

The schedules are those of `torch.distributed.pipelining`. Here is what they lack: micro-batches of different shapes,
dropout as of one process, and tied embeddings.

    stage 0   F0 F1 F2 F3                B0 B1 B2 B3      gpipe: every forward pass, then every backward pass
    stage 1      F0 F1 F2 F3          B0 B1 B2 B3
    stage 0   F0 F1    B0 F2 B1 F3 B2    B3               1f1b: in turn, so that few micro-batches are held at a time
    stage 1      F0 B0 F1 B1 F2 B2 F3 B3

With P workers, S stages on each and M micro-batches in a step, a worker is idle for

- gpipe (Huang et al. 2019), 1f1b (PipeDream-flush, Narayanan et al. 2021): (P - 1) / M of the time that it computes
- interleaved-1f1b (Narayanan et al. 2021), looped-bfs (Lamy-Poirier 2023): (P - 1) / (S M)
- interleaved-zero-bubble, zbv-zero-bubble (Qi et al. 2023), dualpipev (DeepSeek-AI 2024): less, down to none, since
  backward passes are split, and the part that only the weights need is done when there is nothing else to do

and holds up to M micro-batches under gpipe and looped-bfs, about P under the others.

Over each boundary between two workers go, for each micro-batch, its hidden states, and back their gradient. Where
the model has dropout, the state of the random numbers goes with them: a stage draws what one process would draw.
Embeddings tied to the head are trained on the first worker. In each step the last one gets its copy from there, and
sends its gradient: as many bytes as an all-reduce between the two, and the copies stay the same bits whatever runs.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoal.layouts import schedule
from shoal.layouts.base import Autocast, Function, MicroBatch, PlacedModel, Request, shape_of
from shoal.layouts.schedule import Stage
from shoal.layouts.stages import Stages
from shoal.tensors.piece import Piece
from shoal.wire.wire import Exchange


class Pipelined(PlacedModel):
    """The stages of this worker, which compute all micro-batches of a step by a schedule."""

    singly = False

    def __init__(self, inner: PlacedModel, request: Request) -> None:
        super().__init__(inner.model, inner.pieces, inner._loss, inner)
        logging.getLogger("torch.distributed.pipelining").setLevel(
            logging.CRITICAL
        )  # it would log pages beside an error
        self.stages = stages = _stages_of(inner)
        self.schedule = request.options.schedule
        self.wire = request.mesh.wire("pipeline")
        self.wire.barrier()  # with NCCL the first exchange of a group must be one of all its ranks
        self.own = [
            Stage(stages, index, self.wire, self._compute, lambda last: inner._begin(last=last))
            for index in stages.mine
        ]
        self._schedules: dict[int, Any] = {}  # by the count of micro-batches
        self._tied = [piece for piece in self.pieces if piece.name in stages.tied]
        self._autocast: Autocast
        self._losses: list[Tensor] = []  # of a step, where the last stage is
        self._sending: list[Exchange] = []

    @property
    def _reports(self) -> bool:
        return self.stages.owners[-1] == self.wire.rank and super()._reports

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], scale: float, autocast: Autocast, *, last: bool
    ) -> list[float]:
        """By the schedule. Where it needs more micro-batches, the last one is repeated with a loss times 0."""
        count = self._filled(len(micro_batches))
        more = count - len(micro_batches)
        self._autocast, self._losses = autocast, []
        for stage in self.own:
            stage.begin([*micro_batches, *[micro_batches[-1]] * more])
        if count not in self._schedules:
            self._schedules[count] = schedule.make(self.schedule, self.own, count)
        # Not its `step`, which would cut one batch into micro-batches of one shape.
        self._schedules[count]._step_microbatches(
            target_mbs=[scale] * len(micro_batches) + [0.0] * more, return_outputs=False
        )
        self._return_gradients()
        if not self._reports:
            return [0.0] * len(micro_batches)
        return [loss.item() for loss in self._losses[: len(micro_batches)]]

    def _filled(self, count: int) -> int:
        return schedule.filled(self.schedule, count, self.wire.world_size, len(self.stages.owners))

    def _compute(self, stage: int, received: Sequence[Tensor], micro_batch: MicroBatch) -> Any:
        generator = self.stages.generator

        def entering() -> Tensor:
            hidden, *state = received
            if state:
                generator.set_state(state[0].cpu())
            return hidden

        if not received:
            torch.manual_seed(micro_batch.seed)
        with self._autocast():
            made = self._run(self._loss, stage, entering if received else None, micro_batch.inputs)
        if stage == self.stages.last:
            self._losses.append(made.detach())
            return made
        return (made, generator.get_state().to(made.device)) if self.stages.draws else made

    def _run(
        self,
        function: Function,
        stage: int,
        entering: Callable[[], Tensor] | None,
        inputs: dict[str, Tensor],
    ) -> Tensor:
        with self.stages.only(stage, entering):
            return super()._apply(function, inputs)

    def _apply(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        """Stage by stage. A worker that has sent hidden states goes on with the next micro-batch."""
        made = torch.zeros((), device=self.stages.device)
        for stage in self.own:
            index = stage.stage_index
            if stage.is_apart(index - 1):
                made = self.stages.room(index - 1, *shape_of(inputs))[0]
                self.wire.start_receive(made, self.stages.owners[index - 1], "hidden states").wait()
            made = self._run(function, index, partial(_itself, made) if index else None, inputs)
            if stage.is_apart(index + 1):
                self._finish_sending()
                after = self.stages.owners[index + 1]
                self._sending.append(self.wire.start_send(made.contiguous(), after, "hidden states"))
        return made

    def _finish_sending(self) -> None:
        while self._sending:
            self._sending.pop().wait()

    def after_evaluation(self) -> None:
        self._finish_sending()
        super().after_evaluation()

    def before_forward(self) -> None:
        """Copy tied embeddings from the first stage to the last one."""
        super().before_forward()
        for piece in self._tied:
            self._move(_values(piece), to_first=False)

    def _return_gradients(self) -> None:
        """Add the last stage's gradient of tied embeddings to the first stage's."""
        for piece in self._tied:
            if not piece.source.requires_grad:
                continue
            grad = torch.zeros_like(_values(piece), dtype=piece.source.grad_dtype)
            if self.stages.follows and piece.source.grad is not None:
                grad = piece.unwrap(piece.source.grad)
            self._move(grad, to_first=True)
            if self.stages.follows or piece.source.grad is None:
                piece.source.grad = None if self.stages.follows else piece.wrap(grad)
            else:
                piece.unwrap(piece.source.grad).add_(grad)

    def _move(self, tensor: Tensor, *, to_first: bool) -> None:
        """Send `tensor` between the workers of the first and the last stage: it overwrites the receiver's."""
        if not tensor.numel():
            return
        if self.stages.follows == to_first:
            other = self.stages.owners[0 if to_first else -1]
            self.wire.start_send(tensor.contiguous(), other, "tied embeddings").wait()
        else:
            other = self.stages.owners[-1 if to_first else 0]
            self.wire.start_receive(tensor, other, "tied embeddings").wait()

    def _cost(self, turns: int, shape: tuple[int, int]) -> float:
        """As the head of this file has it."""
        sent = 0
        for stage in self.own:
            index = stage.stage_index
            if stage.is_apart(index + 1):
                sent += sum(each.nbytes for each in self.stages.room(index, *shape))
            if stage.is_apart(index - 1):
                sent += self.stages.room(index - 1, *shape)[0].nbytes
        tied = [piece for piece in self._tied if piece.source.requires_grad or not self.stages.follows]
        count = self._filled(turns)
        once = sum(
            _values(piece).numel() * _sent_dtype(piece, self.stages.follows).itemsize for piece in tied
        )
        return super()._cost(count, shape) + count * sent + once

    def __str__(self) -> str:
        return f"pipelines of {self.wire.world_size} workers by {self.schedule}, {self._inner}"


def _stages_of(inner: PlacedModel | None) -> Stages:
    while not isinstance(inner, Stages):
        assert inner is not None, "`Stages` comes before"
        inner = inner._inner
    return inner


def _values(piece: Piece) -> Tensor:
    """This worker's values of a tied parameter, which it trains or copies."""
    return piece.unwrap(piece.source.detach())


def _sent_dtype(piece: Piece, follows: bool) -> torch.dtype:
    """The dtype of what a worker sends of a tied parameter: its gradient if it follows, else its values."""
    found = piece.source.grad_dtype if follows else piece.source.dtype
    assert found is not None
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor
