"""Where a process stands among the others, before it has met them. Without torch: the launcher reads it too."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rendezvous:
    """What an engine gives a process: its rank, the world size, and where the ranks meet.

    Rank 0 serves the store, on the listening socket `store_fd` if it inherited one from the launcher, unless the
    engine itself serves it. `attempt` counts restarts by the engine: each meets under fresh keys. `local_size` is
    how many there are on this machine, 0 where the engine does not say. `token` is what the ranks of one run have and
    others do not: who gives another one is not let in.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    store_fd: int | None = None
    served: bool = False
    attempt: int = 0
    local_size: int = 0
    interface: str = ""  # by which this rank reaches the others, where the environment names one
    token: str = field(default="", repr=False)
