"""The table of strategies: what each one is, as data. Whatever depends on a strategy, and is none, asks here."""

from dataclasses import dataclass
from typing import Literal

GUARDED = ("guard", "guard_drift", "guard_steps")
LOCAL = ("sync_every", "outer_lr", "outer_momentum", "local_after", "normalize", *GUARDED)
ENCODED = ("codec", "error_feedback", "error_decay")
SERVERS = ("servers", "share_memory", *ENCODED)


@dataclass(frozen=True)
class Traits:
    """What a strategy is. `options` are the settings of `StrategyConfig` that it reads beside those that all read."""

    kind: str = ""  # module and class in `shoal.sync`; a function `cost` stands beside the class
    options: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    # What replicas send: gradients of every step, which add up; how far parameters have moved in several steps;
    # differences to what was sent before; gradients to a server; or something of their own.
    sends: Literal["gradients", "deltas", "differences", "pushes", "own"] = "own"
    replicas_differ: bool = False  # whether they may, after a step, in parameters or optimizer state
    period: str = ""  # steps between two agreements, where `sync_every` is empty and may be given
    keeps_optimizer: bool = True  # whether a worker keeps the state of the optimizer that was asked for
    is_optimizer: bool = False  # whether it is the optimizer itself
    # Which workers the others can do without: none, all but rank 0, or those beside no server (with a quorum alone).
    spares: Literal["none", "workers", "beside no server", "beside no server, with a quorum"] = "none"

    @property
    def sums_gradients(self) -> bool:
        """Whether every step adds up the gradients of all ranks, as plain data-parallel training does."""
        return self.sends == "gradients"

    @property
    def is_central(self) -> bool:
        """Whether servers hold the parameters."""
        return self.sends == "pushes"


STRATEGIES: dict[str, Traits] = {
    "allreduce": Traits(
        "allreduce.AllReduce", (*ENCODED, "normalize", "clip_each"), aliases=("ddp",), sends="gradients"
    ),
    "server": Traits(
        "server.Server",
        (*SERVERS, "aggregation", "trim", "quorum"),
        sends="pushes",
        keeps_optimizer=False,
        spares="beside no server, with a quorum",
    ),
    "async": Traits(
        "asynchronous.Async",
        (
            *SERVERS,
            *("max_staleness", "collect", "staleness_lr", "delay_compensation", "delayed_momentum"),
            *("guard", "guard_steps"),
        ),
        sends="pushes",
        keeps_optimizer=False,
        spares="beside no server",
    ),
    # 16: of the 4 to 16 steps of Lin et al. 2020; 30: of the 30 to 100 of Streaming DiLoCo.
    "local": Traits(
        "local.Local",
        (*LOCAL, *ENCODED, "averaging", "group_size", "global_every"),
        aliases=("local-sgd",),
        sends="deltas",
        replicas_differ=True,
        period="16",
    ),
    "diloco": Traits(
        "diloco.DiLoCo",
        (*LOCAL, *ENCODED, "fragments", "overlap_steps", "mixing"),
        sends="deltas",
        replicas_differ=True,
        period="30",
    ),
    "noloco": Traits("noloco.NoLoCo", LOCAL, replicas_differ=True, period="30"),
    "gossip": Traits(
        "gossip.Gossip",
        (
            *ENCODED,
            *("topology", "overlap_steps", "mixing", "normalize", *GUARDED),
        ),
        sends="differences",
        replicas_differ=True,
        spares="workers",
    ),
    "demo": Traits(
        "demo.DeMo",
        ("demo_decay", "demo_chunk", "demo_topk"),
        keeps_optimizer=False,
        is_optimizer=True,
    ),
}
DEFAULT, *_ = STRATEGIES
SUMMING, *_ = (name for name, traits in STRATEGIES.items() if traits.sums_gradients)


def readers(option: str) -> str:
    """The strategies that read a setting, with spaces between them."""
    return " ".join(name for name, traits in STRATEGIES.items() if option in traits.options)
