"""Data parallelism around a loop of one's own: `shoal.Session`."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from shoal import checkpoint
from shoal.checkpoint import Checkpoints, Progress
from shoal.config import RunConfig, check_options, load_config
from shoal.data.order import derive_seed
from shoal.engines.joining import joined
from shoal.errors import UserError
from shoal.layouts import replicated
from shoal.layouts.base import whole_model
from shoal.replica import Step
from shoal.shares import equal
from shoal.tasks import Surroundings
from shoal.tensors import precision
from shoal.tensors.piece import take_wide_gradients, trained
from shoal.training.assemble import build_replica, build_sync
from shoal.training.resume import restore
from shoal.training.saving import Saver

BUCKET_MB = 25.0  # the default of torch: a caller knows the bytes of each step by it
EVERY_ONE = 2**31  # checkpoints are the caller's to remove


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
    train`: by default a GPU for each worker where there are some, else its share of the cores. So are further
    settings, by the names of flags: `Session(8, strategy="diloco", sync_every=30, codec="int8")`. Raises UserError
    for those that a loop of one's own cannot have: a cut replica, servers, a strategy that is an optimizer.
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
        **settings: Any,
    ) -> None:
        self.micro_batches = micro_batches
        self.progress = Progress()
        given = {"seed": seed, "exact": exact, "max_grad_norm": max_grad_norm, "device": device}
        given |= {} if threads is None else {"threads": threads}
        resolved = load_config(None, [], {}, **{"bucket_mb": BUCKET_MB} | given | settings)
        check_options(resolved)
        self._config = resolved.config
        _check_session(self._config)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.mesh = self._open.enter_context(joined(self._config))
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
        placed = whole_model(model.to(self.mesh.device), _computed_by_the_caller)
        take_wide_gradients(placed.pieces)
        replicated.broadcast_parameters(placed, self.mesh)
        _hand_over_rounded(optimizer)
        config, mesh = self._config, self.mesh
        self._replica = replica = build_replica(
            config,
            mesh,
            policy,
            placed,
            [optimizer],
            trained(placed.pieces),
            lambda step: float(optimizer.param_groups[0]["lr"]),
            equal(self.micro_batches, mesh.world_size),
        )
        self._sync, self._watch, _ = build_sync(
            config, replica, print if mesh.is_first else lambda line: None
        )
        self._sync.attach(replica)
        self.progress = replace(self.progress, strategy=config.strategy.remembers)
        return placed.model, optimizer

    def share(self) -> Iterator[int]:
        """The micro-batches of this step that are this worker's, each with its own seed for dropout and the like."""
        self._replica.begin(self.progress.step)
        for v in self._replica.shares.of(self.mesh.rank):
            self._micro_batch = v
            torch.manual_seed(derive_seed(self._config.train.seed, "dropout", self.progress.step, v))
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
        """Agree by the labels of all workers, clip, update; returns the mean loss a label of the whole step."""
        own_labels = int(self._sums[1])
        loss, labels = self.wire.sum(self._sums).tolist()
        self._sums.zero_()
        losses = torch.zeros(0, dtype=torch.float64)  # each micro-batch's is the caller's
        step = Step(self.progress.step, int(labels), own_labels, losses, divisor=max(1, int(labels)))
        self._sync.step(self._replica, step)
        mean = float(loss / max(1.0, labels))
        self._watch(mean)
        done, tokens = self.progress.step + 1, self.progress.tokens + int(labels)
        self.progress = replace(self.progress, step=done, tokens=tokens)
        return mean

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint below `folder`, atomically: the one model of all, and what the strategy remembers."""
        mesh, differ = self.mesh, self._config.strategy.traits.replicas_differ
        checkpoints = Checkpoints(
            Path(folder), every=0, keep=EVERY_ONE, rank=mesh.rank, world_size=mesh.world_size
        )
        saver = Saver(
            checkpoints, self._replica, self._sync, Surroundings(self._config, Path(folder)), differ
        )
        saver.save(self.progress)
        checkpoints.finish()
        self.wire.wait_for_first()

    def load(self, folder: str | Path) -> bool:
        """Go on from the newest valid checkpoint below `folder`; returns whether there was one."""
        found = checkpoint.find("latest", Path(folder), print) if self.mesh.is_first else None
        chosen = self.wire.share_text(str(found or ""))
        if chosen:
            saved, differ = (
                checkpoint.load_progress(Path(chosen)),
                self._config.strategy.traits.replicas_differ,
            )
            now, say = self.progress, print if self.mesh.is_first else lambda line: None
            restore(Path(chosen), saved, now, self._replica, self._sync, replicas_differ=differ, say=say)
            self.progress = replace(saved, strategy=now.strategy)
        return bool(chosen)


def _check_session(config: RunConfig) -> None:
    """Raise UserError for what a loop of one's own cannot have."""
    strategy, traits = config.strategy, config.strategy.traits
    layout = config.layout
    refused = {
        f"strategy={strategy.name}": traits.is_central or traits.is_optimizer,
        "clip_each": bool(strategy.clip_each),
        "normalize=each": strategy.normalize == "each",
        "a replica that is cut (dp_shard, tp, pp, cp)": max(
            layout.tp, layout.pp, layout.cp, layout.dp_shard or 1
        )
        > 1
        or layout.zero_stage is not None,
    }
    for asked in (name for name, is_asked in refused.items() if is_asked):
        found = "the optimizer, the model and the sum of a step's labels are the caller's"
        raise UserError(f"shoal.Session, {asked}", found, "leave it out, or use shoal train")


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


def _computed_by_the_caller(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    raise AssertionError("a session's loss is computed in the caller's loop")
