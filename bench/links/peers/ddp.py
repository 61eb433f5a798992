"""Plain DistributedDataParallel over gloo, or with torch's PowerSGD hook."""

from contextlib import nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from bench.links.peers import common

FIRST_COMPRESSED = 2  # the least that torch allows with error feedback
ONE_BUCKET = (
    64  # MB: with several, the hook's second exchanges start in another order on each rank, which ends it
)
NANOSECONDS = 1e9


def main() -> None:
    """Train to the end of the schedule."""
    rank, job = common.arguments("--powersgd", 0, "rank of the approximation; 0 = plain DDP")
    dist.init_process_group("gloo")
    room = ONE_BUCKET if rank else None
    model = DistributedDataParallel(Loss(job), gradient_as_bucket_view=True, bucket_cap_mb=room)
    model._set_ddp_runtime_logging_sample_rate(1)
    if rank:
        state = powersgd.PowerSGDState(None, rank, start_powerSGD_iter=FIRST_COMPRESSED)
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    job.record.start()
    for step in range(job.train.max_steps):
        batch = job.batches.at(step)
        for v in job.share:
            last = v == job.share.stop - 1
            with nullcontext() if last else model.no_sync():
                loss = model(batch.micro_batch(v))
                (loss * job.world_size / batch.labels).backward()  # DDP takes the mean over the workers
        job.update(step)
        job.record.step(step, batch.labels, exposed_seconds(model))
        if job.validation_due(step):
            job.record.validated(step, job.validate())


class Loss(nn.Module):
    """The model and its loss in one forward pass, for DDP to wrap."""

    def __init__(self, job: common.Job) -> None:
        super().__init__()
        self.model = job.model
        self.loss = job.loss

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch."""
        return self.loss(inputs)


def exposed_seconds(model: DistributedDataParallel) -> float:
    """Of the backward pass, by DDP's own clocks: exchange (the hook's work included) that no computation covered.

    DDP closes its books in the next forward pass: it is the one of the step before, and none in the first step.
    """
    times = model._get_ddp_logging_data()
    covered = times.get("backward_compute_comm_overlap_time", 0)
    return (times.get("backward_comm_time", 0) - covered) / NANOSECONDS


if __name__ == "__main__":
    main()
