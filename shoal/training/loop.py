"""The loop. No line of it asks which strategy runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.errors import Preempted, ShoalError
from shoal.replica import Step
from shoal.training.recorder import Observer
from shoal.training.run import Run

Stop = Callable[[], bool]


def train(run: Run, stop: Stop) -> dict[str, float]:
    """Run the loop from where `run` stands to its last step, and validate.

    Returns the metrics of the last evaluation. When `stop()` comes true on any rank, all of them end the step in hand
    (or leave an evaluation, at most ASK_EVERY micro-batches later), save and raise Preempted. Raises ShoalError when
    too many steps in a row had no finite gradient.
    """
    stopping = False
    with Observer(run) as observer:
        for step in range(run.progress.step, run.total_steps):
            batch = run.batches.at(step)
            with observer.watching(step):
                taken = run.replica.gradients(batch)
                run.settle()  # a save in flight still reads the parameters until here
                run.sync.step(run.replica, taken)
            tally = _agree(run, taken, stop())
            observer.step(batch, taken, tally.loss)
            run.commit(batch, taken, tally.loss)
            run.balance(tally.seconds)
            metrics = observer.evaluate(stop) if run.evaluation_due and not tally.stopping else {}
            stopping = tally.stopping or metrics is None
            improved = _improves(run, metrics)
            if improved or (run.checkpoints.due(step + 1) and not stopping):
                run.save(best=improved)
            _give_up_if_not_finite(run)
            if stopping:
                break
        run.leave()
        run.save()
        metrics = None if stopping else observer.evaluate(stop)
        if metrics is None:
            run.checkpoints.finish()
            raise _preempted(run)
        if _improves(run, metrics):
            run.save(best=True)
        run.checkpoints.finish()
        return metrics


@dataclass(frozen=True)
class Tally:
    """What all ranks know after a step: its loss a label, each team's seconds of computing, whether to stop."""

    loss: float
    seconds: list[float]
    stopping: bool


def _agree(run: Run, step: Step, stopping: bool) -> Tally:
    """One small sum tells every rank the same. The losses add up in the order of their micro-batches."""
    losses = step.losses
    numbers = torch.zeros(len(losses) + run.mesh.teams + 2, dtype=torch.float64)
    numbers[: len(losses)] = losses
    numbers[len(losses) + run.mesh.team] = step.seconds.compute / run.mesh.size("team")
    island = run.replica.island
    numbers[-2:] = torch.tensor([step.own_labels if island.is_first else 0, stopping])
    numbers = run.agree(numbers)
    loss = numbers[: len(losses)].sum() / numbers[-2].clamp(min=1)
    return Tally(loss.item(), numbers[len(losses) : -2].tolist(), bool(numbers[-1] > 0))


def _improves(run: Run, metrics: dict[str, float] | None) -> bool:
    if not metrics or not metrics["eval/loss"] < (run.progress.best or float("inf")):
        return False
    run.progress.best = metrics["eval/loss"]
    return True


def _give_up_if_not_finite(run: Run) -> None:
    in_a_row = run.replica.nonfinite_steps
    if in_a_row >= run.config.train.max_nonfinite_steps:
        raise ShoalError(
            f"step {run.progress.step}: the gradient was not finite {in_a_row} times in a row; "
            f"lower --learning-rate, or resume from an earlier checkpoint in {run.folder}"
        )


def _preempted(run: Run) -> Preempted:
    return Preempted(
        f"stopped at step {run.progress.step} of {run.total_steps}, saved in {run.folder}; "
        "go on with --resume-from-checkpoint latest"
    )
