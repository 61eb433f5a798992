"""How many workers a machine gets, of how many threads each, and on which kind of device."""

from contextlib import suppress

from shoal.config.batch import resolve_batch
from shoal.config.grid import grid_sizes, team_size
from shoal.config.record import RunConfig
from shoal.errors import UserError
from shoal.system.devices import Machine, no_gpu, too_few

GPU_THREADS = 8  # beside a GPU more threads have nothing to do


def wanted_device(config: RunConfig) -> str:
    """What workers are to compute on: auto, cpu or gpu. Raises UserError where two settings contradict."""
    device, count = config.launch.device, config.launch.nproc_per_node
    if isinstance(count, int) or count == "auto" or count == device:
        return device
    if device != "auto":
        raise UserError(f"--nproc-per-node {count}", f"--device is {device}", "leave one of the two out")
    return count


def resolve_workers(config: RunConfig, machine: Machine) -> int:
    """How many workers to start on `machine`: one a GPU where it has some, else as many as its cores can run.

    A number is used as given: it may exceed the cores, but neither the GPUs nor the micro-batches.
    Anything else means the most that the machine, the batch and the layout allow. Raises UserError.
    """
    asked = config.launch.nproc_per_node
    if wanted_device(config) == "gpu" and not machine.gpus:
        raise no_gpu(f"--nproc-per-node {asked}" if asked == "gpu" else "--device gpu")
    if isinstance(asked, int):
        if 0 < machine.gpus < asked:
            raise too_few(f"--nproc-per-node {asked}", machine.gpus)
        _check(config, asked)
        return asked
    most = machine.gpus or max(team_size(config), machine.cores // (_threads(config, machine) or 1))
    for workers in range(most, 0, -1):
        with suppress(UserError):
            _check(config, workers)
            return workers
    _check(config, most)
    raise AssertionError("unreachable: so many workers were refused above")


def resolve_threads(config: RunConfig, workers: int, machine: Machine) -> int:
    """The threads of each of `workers` workers on `machine`: workers x threads fill its cores.

    In exact mode it is 1 unless a number is given: the last bits of a product depend on it.
    """
    share = max(1, machine.cores // workers)
    return _threads(config, machine) or (min(share, GPU_THREADS) if machine.gpus else share)


def idle_gpus(config: RunConfig, workers: int, machine: Machine) -> str:
    """Why fewer workers than GPUs were started, in a sentence; empty where none is idle or the user chose so."""
    if workers >= machine.gpus or isinstance(config.launch.nproc_per_node, int):
        return ""
    try:
        _check(config, machine.gpus)
    except UserError as error:
        return f"{workers} of {machine.gpus} GPUs work: {error}"
    raise AssertionError("unreachable: so many workers would have been started")


def _threads(config: RunConfig, machine: Machine) -> int | None:
    """The threads of a worker that settings or environment fix; None where they follow from the machine."""
    asked = config.train.threads
    if asked != "auto":
        return asked
    return 1 if config.train.exact else machine.threads


def _check(config: RunConfig, workers: int) -> None:
    grid_sizes(config, workers)
    resolve_batch(config, workers // team_size(config))
