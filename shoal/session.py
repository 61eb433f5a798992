"""Data parallelism around a loop of one's own: `shoal.Session`."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from shoal import checkpoint
from shoal.checkpoint import Progress
from shoal.config import RunConfig, load_config, wanted_device
from shoal.data.order import derive_seed
from shoal.engines.environment import is_worker, placement, threads_of
from shoal.errors import UserError
from shoal.layouts import replicated
from shoal.layouts.base import whole_model
from shoal.replica import Replica, Step
from shoal.shares import equal
from shoal.sync.allreduce import AllReduce
from shoal.tensors import precision
from shoal.tensors.buckets import Buckets
from shoal.tensors.piece import take_wide_gradients, trained
from shoal.wire.mesh import join
from shoal.wire.rendezvous import Rendezvous


class Session:
    """One worker among as many as torchrun (or any engine that sets rank and world size) started; or the only one.

        with shoal.Session(micro_batches=4) as session:
            model, optimizer = session.setup(model, optimizer)
            for step in range(session.steps_done, 100):
                for v in session.share():                    # this worker's micro-batches of the step
                    session.backward(loss_sum, labels)       # of micro-batch (step, v), as you define it
                mean_loss = session.step()
            session.save("my-run")

    What micro-batch (step, v) holds must follow from the two numbers alone; then the result does not depend on how
    many workers there are, and with `exact=True` neither do its last bits. `threads` and `device` are those of `shoal
    train`: by default a GPU for each worker where there are some, else its share of the cores.
    """

    def __init__(
        self,
        micro_batches: int,
        *,
        seed: int = 42,
        exact: bool = False,
        max_grad_norm: float = 0.0,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        self.micro_batches = micro_batches
        self.seed = seed
        self.exact = exact
        self.max_grad_norm = max_grad_norm
        self.progress = Progress()
        given = {"exact": exact, "device": device, **({} if threads is None else {"threads": threads})}
        self._config = load_config(None, [], {}, **given).config
        self._open = ExitStack()

    def __enter__(self) -> Self:
        place = placement() if is_worker() else Rendezvous()
        torch.set_num_threads(threads_of(self._config, place))
        self.mesh = self._open.enter_context(join(place, wanted_device(self._config)))
        if self.mesh.world_size > self.micro_batches:
            found = f"{self.micro_batches} micro-batches a step, {self.mesh.world_size} workers"
            raise UserError("shoal.Session", found, "give at least one micro-batch to each worker")
        self.wire = self.mesh.wire("world")
        self._sums = torch.zeros(2, dtype=torch.float64)  # loss and labels of this worker's micro-batches
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def rank(self) -> int:
        """Which of the workers this is; rank 0 speaks."""
        return self.mesh.rank

    @property
    def device(self) -> torch.device:
        """Where the model is after `setup`, and inputs belong."""
        return self.mesh.device

    @property
    def steps_done(self) -> int:
        """How many steps lie behind, those before `load` included."""
        return self.progress.step

    def setup(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the worker's device, with rank 0's weights, and sum gradients as the backward pass runs.

        Call it before the first step, with an optimizer over the model's own parameters. Parameters keep their
        dtypes; gradients add up in at least float32, and an optimizer over bfloat16 parameters is handed the sum
        rounded once. (It rounds small updates away: to train so, hold parameters in float32 and compute under
        `torch.autocast`.) Raises UserError for float16 parameters: there is no loss scale here.
        """
        policy = precision.as_it_is(model)
        placed = whole_model(model.to(self.mesh.device), _taken_by_the_caller)
        take_wide_gradients(placed.pieces)
        replicated.broadcast_parameters(placed, self.mesh)
        _hand_over_rounded(optimizer)
        self._replica = Replica(
            placed=placed,
            mesh=self.mesh,
            buckets=Buckets(
                trained(placed.pieces),
                bucket_bytes=25_000_000,
                multiple=self.mesh.world_size,
                exact=self.exact,
            ),
            optimizers=[optimizer],
            updated=trained(placed.pieces),
            policy=policy,
            seed=self.seed,
            schedule=lambda step: float(optimizer.param_groups[0]["lr"]),
            max_grad_norm=self.max_grad_norm,
            shares=equal(self.micro_batches, self.mesh.world_size),
        )
        self._sync = AllReduce(RunConfig(), self.wire)
        self._sync.attach(self._replica)
        return placed.model, optimizer

    def share(self) -> Iterator[int]:
        """The micro-batches of this step that are this worker's, each with its own seed for dropout and the like."""
        for v in self._replica.shares.of(self.mesh.rank):
            self._micro_batch = v
            torch.manual_seed(derive_seed(self.seed, "dropout", self.progress.step, v))
            yield v

    def backward(self, loss_sum: Tensor, labels: int) -> None:
        """The backward pass of one micro-batch: `loss_sum` is the sum, not the mean, over its `labels`."""
        share = self._replica.shares.of(self.mesh.rank)
        v = self._micro_batch
        self._replica.buckets.begin(v, first=v == share.start, last=v == share.stop - 1)
        loss_sum.backward()
        self._replica.buckets.end()
        self._sums += torch.tensor([loss_sum.item(), labels], dtype=torch.float64)

    def step(self) -> float:
        """Average over the labels of all workers, clip, update; returns the mean loss a label of the whole step."""
        own_labels = int(self._sums[1])
        loss, labels = self.wire.sum(self._sums).tolist()
        self._sums.zero_()
        losses = torch.zeros(0, dtype=torch.float64)  # each micro-batch's is the caller's
        divisor = max(1, int(labels))
        step = Step(self.progress.step, int(labels), own_labels, losses, divisor)
        self._sync.step(self._replica, step)
        done, tokens = self.progress.step + 1, self.progress.tokens + int(labels)
        self.progress = replace(self.progress, step=done, tokens=tokens)
        return float(loss / max(1.0, labels))

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint below `folder`, atomically, on rank 0."""
        path = Path(folder) / f"checkpoint-{self.progress.step}"
        if self.mesh.is_first:
            files = {
                "model/model.safetensors": checkpoint.model_tensors(self._replica.placed),
                "optimizer/state.safetensors": dict(self._replica.optimizer_state.tensors()),
            }
            checkpoint.write(path, files, self.progress, None)
        self.wire.wait_for_first()

    def load(self, folder: str | Path) -> bool:
        """Go on from the newest valid checkpoint below `folder`; returns whether there was one."""
        found = checkpoint.find("latest", Path(folder), print) if self.mesh.is_first else None
        chosen = self.wire.share_text(str(found or ""))
        if chosen:
            checkpoint.load_model(Path(chosen), self._replica.placed)
            checkpoint.load_optimizer(Path(chosen), self._replica.optimizer_state, self._replica.placed)
            self.progress = checkpoint.load_progress(Path(chosen))
        return bool(chosen)


def _hand_over_rounded(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer see gradients in its parameters' dtype, as torch's optimizers require."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    narrow = [p for p in params if p.grad_dtype not in (None, p.dtype)]

    def before(*_: object) -> None:
        for p in narrow:
            summed, p.grad = p.grad, None
            p.grad_dtype = p.dtype
            p.grad = None if summed is None else summed.to(p.dtype)

    def after(*_: object) -> None:
        for p in narrow:
            p.grad = None
            p.grad_dtype = torch.promote_types(p.dtype, torch.float32)

    if narrow:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def _taken_by_the_caller(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    raise AssertionError("a session's loss is taken in the caller's loop")
