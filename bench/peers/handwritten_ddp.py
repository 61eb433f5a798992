"""A training loop as an expert writes it by hand: DistributedDataParallel over gloo."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.peers import common


def main() -> None:
    """Train until the data or whoever measures ends it."""
    job = common.arguments()
    dist.init_process_group("gloo")
    llama = common.llama()
    if job.compile:
        llama.compile()
    common.loop(job, DistributedDataParallel(llama, gradient_as_bucket_view=True))


if __name__ == "__main__":
    main()
