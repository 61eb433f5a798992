"""A process that is a worker: it takes its threads and its device, and meets the others, set up as it is."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shoal.config import RunConfig, wanted_device
from shoal.config.names import names
from shoal.engines.environment import is_worker, placement, threads_of, use_interface
from shoal.errors import PeerLost, UserError, WorkerLost
from shoal.system import devices, output
from shoal.system.run_folder import to_go_on
from shoal.tensors import precision
from shoal.wire.meeting import Met
from shoal.wire.mesh import Mesh, join
from shoal.wire.rendezvous import Rendezvous

# What each host may have for itself: how it starts workers, and where its files lie.
OF_A_HOST = {
    "launch", "train.threads", "data.path", "data.eval_path", "data.cache_dir", "checkpoint.output_dir",
}  # fmt: skip
WISHED = {  # what may differ, and changes the last digits where it does
    "torch": torch.__version__,
    "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
}


@contextmanager
def joined(config: RunConfig, data: str = "") -> Iterator[Mesh]:
    """The mesh of the workers that an engine started, or of this process alone. `data` is the key of prepared data.

    Raises UserError on every rank where shoal, a setting or the data is another on one of them, and WorkerLost where
    a rank is gone that this one needs.
    """
    place = placement() if is_worker() else Rendezvous()
    torch.set_num_threads(threads_of(config, place))
    device = devices.device_of(wanted_device(config), place.local_rank, place.local_size)

    def met(meeting: Met) -> None:
        if meeting.way is not None and place.world_size > 1:
            use_interface(meeting.way.name)
        for found in meeting.differences:
            if found.name not in WISHED:
                refused = UserError(found.name, str(found), "give every host the same")
                refused.of_all = True
                raise refused
            if place.rank == 0:
                output.say(
                    f"shoal: warning: {found.name}: {found}; the last digits may differ from run to run"
                )

    facts = _settings(config, device) | {"the prepared data": data} | WISHED
    try:
        with join(place, device, facts, met) as mesh:
            yield mesh
    except PeerLost as lost:
        raise worker_lost(lost, config) from lost


def worker_lost(lost: PeerLost, config: RunConfig) -> WorkerLost:
    """The error of a run that a rank is gone from, and from where training can go on."""
    said = f"{lost.who} is gone: {lost.how}, in {lost.what}" if lost.who else str(lost)
    return WorkerLost(f"{said}; {to_go_on(Path(config.checkpoint.output_dir))}")


def _settings(config: RunConfig, device: str) -> dict[str, str]:
    """What must be alike, as text by the name that a user gives it. What is `auto` is what it means here."""
    found = {}
    for section, values in config.model_dump().items():
        for field, value in values.items():
            key = f"{section}.{field}"
            if not {section, key} & OF_A_HOST:
                known = names().get(key)
                found[key if known is None else known.flag] = str(value)
    kind = torch.device(device)
    return found | {
        "--device": kind.type,
        "--precision": precision.resolve(config.train.precision, kind).name,
    }
