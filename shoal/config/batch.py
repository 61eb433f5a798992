"""Batch arithmetic: any two of global batch, per-device batch and accumulation give the third."""

from dataclasses import dataclass
from math import ceil

from shoal.config.record import RunConfig
from shoal.errors import UserError

PER_DEVICE = 4
GLOBAL = 16

_GLOBAL = "--global-batch-size"
_PER_DEVICE = "--per-device-train-batch-size"
_ACCUMULATION = "--gradient-accumulation-steps"


@dataclass(frozen=True)
class Batch:
    """A step: `micro_batches` (V) micro-batches of `per_device_train_batch_size` samples each.

    `accumulation` is the most micro-batches that one worker takes when all take equal shares.
    """

    global_batch_size: int
    per_device_train_batch_size: int
    micro_batches: int
    accumulation: int


def resolve_batch(config: RunConfig, workers: int) -> Batch:
    """The batch of `config` on `workers` workers, of which a team that computes a micro-batch together counts as one.

    Without accumulation the batch is a function of the configuration alone: the curve does not depend on the
    worker count. Raises UserError with the equation in numbers where it has no solution in whole numbers.
    """
    if workers < 1:
        raise UserError(f"--nproc-per-node {workers}", "a run needs a worker", "give 1 or more, or auto")
    train = config.train
    total, each, turns = (
        train.global_batch_size,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )
    if turns is None:
        each = each or (_largest_divisor(total, PER_DEVICE) if total else PER_DEVICE)
        total = total or each * ceil(GLOBAL / each)
    elif total is None:
        each = each or PER_DEVICE
        total = each * turns * workers
    elif each is None:
        if total % (turns * workers):
            raise _contradiction(total, None, turns, workers)
        each = total // (turns * workers)
    elif total != each * turns * workers:
        raise _contradiction(total, each, turns, workers)
    return _cut(total, each, workers)


def _cut(total: int, each: int, workers: int) -> Batch:
    if total % each:
        raise UserError(
            f"{_GLOBAL} {total} with {_PER_DEVICE} {each}",
            f"{total} / {each} = {total / each:.4g} is not a whole number of micro-batches",
            f"take {_GLOBAL} {each * ceil(total / each)} or {_PER_DEVICE} {_largest_divisor(total, each)}",
        )
    micro_batches = total // each
    if micro_batches < workers:
        smaller = _largest_divisor(total, total // workers) if total >= workers else None
        raise UserError(
            f"{workers} workers",
            f"{_GLOBAL} {total} / {_PER_DEVICE} {each} = {micro_batches} micro-batches, fewer than workers",
            f"take --nproc-per-node {micro_batches} or {_GLOBAL} {each * workers}"
            + (f" or {_PER_DEVICE} {smaller}" if smaller else ""),
        )
    return Batch(total, each, micro_batches, ceil(micro_batches / workers))


def _contradiction(total: int, each: int | None, turns: int, workers: int) -> UserError:
    step = turns * workers * (each or 1)
    left = f"{each} per device * {turns} accumulation * {workers} workers"
    if each is None:
        found = f"no whole per-device batch: global {total} / ({turns} accumulation * {workers} workers)"
        return UserError(
            f"{_GLOBAL} {total} with {_ACCUMULATION} {turns}",
            f"{found} = {total / step:.4g}",
            f"take {_GLOBAL} {step * ceil(total / step)}",
        )
    return UserError(
        f"{_GLOBAL} {total} with {_PER_DEVICE} {each} and {_ACCUMULATION} {turns}",
        f"{left} = {step}, not {total}",
        f"take {_GLOBAL} {step}, or leave one of the three out",
    )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
