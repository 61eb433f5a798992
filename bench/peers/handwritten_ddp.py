"""A training loop as an expert writes it by hand: DistributedDataParallel over gloo."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    llama = common.llama()
    if job.compile:
        llama.compile()
    model = DistributedDataParallel(llama, gradient_as_bucket_view=True)
    optimizer = common.adamw(model.parameters())
    windows = common.Windows(job.windows)
    loader = DataLoader(windows, job.batch, sampler=DistributedSampler(windows), drop_last=True)
    record = common.Record(job.metrics)
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.step()


if __name__ == "__main__":
    main()
