"""A process that is a worker: it takes its threads and its device, and meets the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.config import RunConfig, wanted_device
from shoal.engines.environment import is_worker, placement, threads_of
from shoal.wire.mesh import Mesh, join
from shoal.wire.rendezvous import Rendezvous


@contextmanager
def joined(config: RunConfig) -> Iterator[Mesh]:
    """The mesh of the workers that an engine started, or of this process alone."""
    place = placement() if is_worker() else Rendezvous()
    torch.set_num_threads(threads_of(config, place))
    with join(place, wanted_device(config)) as mesh:
        yield mesh
