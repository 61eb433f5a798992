"""What this machine lets a process compute on: its cores, its GPUs, and the one device that a worker takes.

Nothing else counts them. Torch, which takes seconds to import, is asked only where there is a GPU's driver.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UserError

# NVIDIA's and AMD's drivers, that of Windows' Linux, and that of NVIDIA's boards.
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/nvmap")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What the workers of one machine share: usable `cores`, and `gpus` unless they compute on the cores.

    `threads` are those of each worker where the environment gives a number (OMP_NUM_THREADS).
    """

    cores: int
    gpus: int = 0
    threads: int | None = None


def usable_cores() -> int:
    """The cores this process may run on: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _quota(CGROUP) or cores)


def gpus() -> int:
    """How many GPUs torch can use here (CUDA or ROCm), as CUDA_VISIBLE_DEVICES and the like leave them."""
    if not has_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_driver() -> bool:
    """Whether there is a GPU's driver, whether or not torch can use it."""
    return any(Path(driver).exists() for driver in DRIVERS)


def device_of(wanted: str, local_rank: int, local_size: int) -> str:
    """Torch's name of the device of a worker: "cpu", or "cuda:N".

    `wanted` is auto, cpu or gpu; `local_size` is how many workers this machine has, 0 where nobody says. A worker
    that sees one GPU takes it: engines such as `srun --gpus-per-task=1` show each its own. Raises UserError where
    there is no GPU for it.
    """
    count = 0 if wanted == "cpu" else gpus()
    if not count:
        if wanted == "gpu":
            raise no_gpu("--device gpu")
        return "cpu"
    workers = max(local_size, local_rank + 1)
    if 1 < count < workers:
        raise too_few(f"{workers} workers on this machine", count)
    return f"cuda:{0 if count == 1 else local_rank}"


def identity(device: str) -> str:
    """What tells a GPU from all others of its machine."""
    import torch

    found = torch.cuda.get_device_properties(device)
    index = device if torch.cuda.device_count() > 1 else ""
    return f"{getattr(found, 'uuid', '')} {getattr(found, 'pci_bus_id', '')} {index}"


def describe(count: int) -> list[str]:
    """Name and memory of the first `count` GPUs."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [f"{each.name} with {each.total_memory / 2**30:.0f} GiB" for each in found]


def no_gpu(asked: str) -> UserError:
    """The refusal where a GPU is asked for and torch sees none."""
    return UserError(asked, "torch sees no GPU here", "take cpu or auto (`shoal doctor` says what is there)")


def too_few(asked: str, count: int) -> UserError:
    """The refusal where there are fewer GPUs than workers."""
    found = f"{count} GPU{'s are' if count > 1 else ' is'} visible, and each worker takes one"
    return UserError(asked, found, f"start {count}, or train on the cores: --device cpu")


def _quota(root: Path) -> int | None:
    """The whole cores of a container's quota of processor time; None where it has none."""
    with suppress(OSError, ValueError):  # control groups, version 2
        quota, period = (root / "cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    with suppress(OSError, ValueError):  # version 1, in which -1 is none
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    return None
