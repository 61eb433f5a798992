"""The same loop with torch's own sharding, as its tutorial has it: `fully_shard` on every layer and the root."""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    model = common.llama()
    for module in (*model.model.layers, model):
        fully_shard(module, reshard_after_forward=job.layout == "zero3")
    common.loop(job, model)


if __name__ == "__main__":
    main()
