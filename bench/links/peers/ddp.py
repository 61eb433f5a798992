"""Plain DistributedDataParallel over gloo, or with torch's PowerSGD hook."""

from contextlib import nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from bench.links.peers import common

FIRST_COMPRESSED = 2  # the least that torch allows with error feedback
NANOSECONDS = 1e9


def main() -> None:
    """Train to the end of the schedule."""
    rank, job = common.arguments("--powersgd", 0, "rank of the approximation; 0 = plain DDP")
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Loss(job), gradient_as_bucket_view=True)
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
    """Of the last backward pass, by DDP's own clocks: communication that no computation covered."""
    times = model._get_ddp_logging_data()
    return (times["backward_comm_time"] - times["backward_compute_comm_overlap_time"]) / NANOSECONDS


if __name__ == "__main__":
    main()
