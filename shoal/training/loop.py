"""The loop. No line of it asks which strategy runs."""

from collections.abc import Callable

from shoal.errors import Preempted, ShoalError
from shoal.training.evaluate import validate
from shoal.training.recorder import Recorder
from shoal.training.run import Run


def train(run: Run, stop: Callable[[], bool]) -> dict[str, float]:
    """Run the loop from where `run` stands to its last step, and validate.

    Returns the metrics of the last evaluation. When `stop()` comes true on any rank, all of them end the step in hand
    (or leave an evaluation, at most ASK_EVERY micro-batches later), save and raise Preempted. Raises ShoalError when
    too many steps in a row had no finite gradient.
    """
    stopping = False
    with Recorder(run) as recorder:
        if run.config.eval.eval_on_start and not run.progress.step:
            _improves(run, recorder.evaluation(validate(run, stop)))
        run.lap()
        for number in range(run.progress.step, run.total_steps):
            batch = run.batches.at(number)
            with run.memory.watching(number):
                step = run.replica.gradients(batch)
                run.saver.wait_until_read()  # a save under way reads the parameters until here
                run.sync.step(run.replica, step)
            agreed = run.agree(step, stop())
            recorder.step(batch, step, agreed)
            run.commit(batch, step, agreed)
            due = _evaluation_due(run) and not agreed.stopping
            metrics = recorder.evaluation(validate(run, stop)) if due else {}
            stopping = agreed.stopping or metrics is None
            improved = _improves(run, metrics)
            if improved or (run.saver.checkpoints.due(number + 1) and not stopping):
                run.saver.save(run.progress, best=improved)
            _give_up_if_not_finite(run)
            if stopping or _is_over_early(run):
                break
        run.leave()
        run.saver.save(run.progress)
        metrics = None if stopping else recorder.evaluation(validate(run, stop))
        if metrics is None:
            run.saver.checkpoints.finish()
            raise _preempted(run)
        if _improves(run, metrics):
            run.saver.save(run.progress, best=True)
        run.saver.checkpoints.finish()
        return metrics


def _evaluation_due(run: Run) -> bool:
    """Whether to validate after the steps done, before the run's end, where it is always done."""
    every, done = run.config.eval.eval_steps, run.progress.step
    return bool(every) and done % every == 0 and done < run.total_steps


def _improves(run: Run, metrics: dict[str, float] | None) -> bool:
    """Whether these are the best metrics so far, by the one that the task names."""
    if not metrics:
        return False
    name, direction = run.task.best
    found, best = metrics[name], run.progress.best
    improves = best is None or (found < best if direction == "min" else found > best)
    improves = improves and found == found
    if improves:
        run.progress.best = found
    run.progress.worse = 0 if improves else run.progress.worse + 1
    return improves


def _is_over_early(run: Run) -> bool:
    """Whether so many evaluations in a row were no better than the best that the user has had enough."""
    patience = run.config.eval.early_stopping_patience
    if not patience or run.progress.worse < patience:
        return False
    run.screen.say(
        f"step: {run.progress.step} no better {run.task.best[0]} in {patience} evaluations: the run ends"
    )
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
