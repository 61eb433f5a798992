"""torchft's DiLoCo, after its own example: every worker is a replica group of one, rank 0 serves the lighthouse."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.links.peers import common

LIGHTHOUSE_PORT = 29510
PATIENCE = timedelta(minutes=10)  # for one exchange on a slow link
OUTER: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}  # DiLoCo, Douillard et al., 2023

try:
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo
except ImportError:
    sys.exit("torchft is not installed: pip install torchft==0.2.0")


def main() -> None:
    """Train to the end of the schedule."""
    sync_every, job = common.arguments("--sync-every", 16, "local steps between two exchanges")
    dist.init_process_group("gloo")  # for validation only
    with managed(job) as manager:
        outer = torch.optim.SGD(job.model.parameters(), **OUTER)
        wait = Stopwatch()
        job.optimizer.register_step_post_hook(
            wait.start
        )  # hooks run in their order, DiLoCo's between the two
        with DiLoCo(manager, [job.model], job.optimizer, outer, sync_every=sync_every):
            job.optimizer.register_step_post_hook(wait.stop)
            train(job, wait)


def train(job: common.Job, wait: "Stopwatch") -> None:
    """Local steps; DiLoCo exchanges inside the optimizer's step."""
    job.record.start()
    for step in range(job.train.max_steps):
        batch = job.batches.at(step)
        for v in job.share:
            (job.loss(batch.micro_batch(v)) / job.own_labels(batch)).backward()
        job.update(step)
        job.record.step(step, batch.labels, wait.seconds)
        if job.validation_due(step):
            with mean_of_replicas(job.model):
                job.record.validated(step, job.validate())


@contextmanager
def managed(job: common.Job) -> Iterator[Manager]:
    """torchft's manager of this worker, and on rank 0 the lighthouse where all meet."""
    bind = f"[::]:{LIGHTHOUSE_PORT}"
    lighthouse = LighthouseServer(bind=bind, min_replicas=job.world_size) if job.rank == 0 else None
    address = os.environ["HOST_ADDR"]
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=job.model.load_state_dict,
        state_dict=job.model.state_dict,
        min_replica_size=job.world_size,
        use_async_quorum=False,
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{LIGHTHOUSE_PORT}",
        replica_id=f"host{job.rank}",
        hostname=address,
        init_sync=False,  # all start from the same weights; with it the others' first round would be discarded
    )
    try:
        yield manager
    finally:
        manager.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()


class Stopwatch:
    """How long it took from one hook of the optimizer's step to another."""

    seconds = 0.0

    def start(self, *step: object) -> None:
        """The local update is done."""
        self.began = time.perf_counter()

    def stop(self, *step: object) -> None:
        """The exchange is done, where there was one."""
        self.seconds = time.perf_counter() - self.began


@contextmanager
@torch.no_grad()
def mean_of_replicas(model: nn.Module) -> Iterator[None]:
    """Within it the parameters are the mean over the workers: the model that is validated in mid-round."""
    own = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        dist.all_reduce(p)
        p.div_(dist.get_world_size())
    yield
    for p, kept in zip(model.parameters(), own, strict=True):
        p.copy_(kept)


if __name__ == "__main__":
    main()
