"""The same loop with torch's own sharding, as its tutorial has it: `fully_shard` on every layer and the root."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    model = common.llama()
    for module in (*model.model.layers, model):
        fully_shard(module, reshard_after_forward=job.layout == "zero3")
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
