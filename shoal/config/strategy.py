"""How replicas agree: the settings of every strategy and codec. Each belongs to those that read it."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from shoal.config.section import Section, fact
from shoal.config.values import Number, Period, Shares, Whole, renamed

Codec = Literal["none", "bf16", "fp16", "int8", "int4", "sign", "topk", "randomk", "powersgd"]
SENDERS = "allreduce server async local diloco gossip"  # what they send is dense: a codec may encode it


class StrategyConfig(Section):
    """How the replicas agree. An empty option is the strategy's or codec's own; one that is not read is refused."""

    primary: ClassVar[str] = "name"

    name: Annotated[str, BeforeValidator(renamed({"ddp": "allreduce", "local-sgd": "local"}))] = fact(
        "allreduce", "the way to synchronise"
    )
    bucket_mb: Number = fact(
        4.0, "megabytes (10^6 bytes) of gradients reduced at once", "bucket_cap_mb", gt=0
    )
    balance: Shares = fact(
        "auto", "shares of the micro-batches: auto = by measured speed, off = equal, or 3,1"
    )

    sync_every: Period | None = fact(
        None, "steps between two syncs; or 100ktokens; or end = once", "outer_every", of="local diloco noloco"
    )
    outer_lr: Number | None = fact(None, "rate of the outer update", of="local diloco noloco", gt=0)
    outer_momentum: Number | None = fact(
        None, "momentum of the outer update", of="local diloco noloco", ge=0, lt=1
    )
    averaging: Literal["mean", "slowmo", "bmuf", "elastic"] = fact(
        "mean", "the outer rule of local", of="local"
    )
    local_after: Whole = fact(
        0, "steps of synchronous training before the local ones", of="local diloco noloco", ge=0
    )
    group_size: Whole | None = fact(
        None, "ranks that sync every sync_every; all of them every global_every", of="local", ge=1
    )
    global_every: Whole | None = fact(None, "steps between two syncs of all groups", of="local", ge=1)
    fragments: Whole = fact(1, "parts of the model, synced one after the other", of="diloco", ge=1)
    overlap_steps: Whole | None = fact(
        None,
        "steps for which what is sent may travel: diloco 0; gossip 1, with 0 it mixes after the update",
        of="diloco gossip",
        ge=0,
    )
    mixing: Number | None = fact(
        None,
        "share of what was agreed on in what a replica goes on with; diloco 1, gossip by its codec",
        of="diloco gossip",
        gt=0,
        le=1,
    )
    topology: Literal["ring", "exponential", "push-sum"] | None = fact(
        None, "who averages with whom; empty = exponential", of="gossip"
    )

    servers: Whole = fact(1, "ranks that hold a part of the parameters as servers", of="server async", ge=1)
    aggregation: Literal["mean", "trimmed-mean", "median"] = fact(
        "mean", "how a server merges the gradients of the workers", of="server"
    )
    trim: Number = fact(
        0.25, "share of the workers that trimmed-mean leaves out at each end", of="server", gt=0, lt=0.5
    )
    quorum: Whole | None = fact(
        None, "workers that an update waits for, the others are backups; empty = all", of="server", ge=1
    )
    max_staleness: Whole | None = fact(
        None, "steps that a worker may be ahead of the last one; empty = any number", of="async", ge=0
    )
    collect: Whole = fact(1, "pushes that make an update; 1 = each on arrival", of="async", ge=1)
    staleness_lr: bool = fact(False, "divide the rate of a push by its staleness", of="async")
    delay_compensation: Number = fact(0.0, "lambda of DC-ASGD, as 0.04; 0 = off", of="async", ge=0)
    delayed_momentum: Whole = fact(
        0,
        "pushes between two updates of a delayed Nesterov momentum, as many as workers; 0 = off",
        of="async",
        ge=0,
    )
    share_memory: bool = fact(
        True, "hand tensors over in memory where worker and server run on one machine", of="server async"
    )

    normalize: Literal["no", "sum", "each"] = fact(
        "no",
        "divide the gradient by its norm: sum = that of all workers, each = every worker its own",
        of="allreduce local diloco noloco gossip",
    )
    clip_each: Number = fact(
        0.0, "the norm every worker clips its own gradient to before the sum; 0 = off", of="allreduce", ge=0
    )

    guard: Number | None = fact(
        None,
        "share by which the loss may rise before the guard acts, such as 0.05; empty = no guard",
        of="local diloco noloco gossip async",
        gt=0,
    )
    guard_drift: Number | None = fact(
        None,
        "share of their norm by which replicas may differ before the guard acts; empty = any",
        of="local diloco noloco gossip",
        gt=0,
    )
    guard_steps: Whole = fact(
        0,
        "synchronous steps at the start, for the guard to compare with",
        of="local diloco noloco gossip async",
        ge=0,
    )

    codec: Codec = fact("none", "how what is sent is encoded", of=SENDERS)
    error_feedback: bool | None = fact(
        None, "carry what a codec left out into the next step; empty = where it is biased", of=SENDERS
    )
    error_decay: Number = fact(
        1.0,
        "what is left of that error from one step to the next, such as SparseLoCo's 0.95",
        of=SENDERS,
        gt=0,
        le=1,
    )
    density: Number | None = fact(None, "share of the elements that is sent", of="topk randomk", gt=0, le=1)
    two_bits: bool = fact(
        False, "send of each value its sign and which of two magnitudes it has, as SparseLoCo", of="topk"
    )
    topk_chunk: Whole = fact(
        0,
        "elements of which the largest are sent, such as SparseLoCo's 4096; 0 = a whole bucket",
        of="topk",
        ge=0,
    )
    rank: Whole | None = fact(None, "columns of the factors", of="powersgd", ge=1)
    block: Whole | None = fact(None, "elements that share a scale", of="int8 int4 sign", ge=1)
    stochastic: bool = fact(False, "round at random, without bias", of="int8 int4")
    codec_momentum: Number = fact(
        0.0,
        "momentum taken before the choice, as in DGC; use it with --optim sgd",
        of="topk randomk sign",
        ge=0,
        lt=1,
    )
    codec_warmup: Whole = fact(
        0, "steps over which the codec sets in", of="topk randomk powersgd sign int8 int4", ge=0
    )

    demo_decay: Number = fact(0.999, "of the decoupled momentum", of="demo", ge=0, lt=1)
    demo_chunk: Whole = fact(64, "the side of the blocks that are transformed", of="demo", ge=1)
    demo_topk: Whole = fact(32, "coefficients of a block that are sent", of="demo", ge=1)

    @property
    def own_period(self) -> str:
        """In the place of an empty `sync_every`: local 4 to 16 (Lin et al. 2020), others Streaming DiLoCo's 30."""
        return {"local": "16"}.get(self.name, "30")

    @property
    def remembers(self) -> str:
        """In words what decides what is remembered between steps: where it is another, that is of no use."""
        words = [self.name]
        words += [self.averaging] if self.averaging != "mean" else []
        words += [self.topology] if self.topology is not None else []
        if self.codec != "none":
            words.append(f"with {self.codec} in {self.bucket_mb:g} MB")
            words += [f"of rank {self.rank}"] if self.codec == "powersgd" else []
            words += [f"for {self.servers} servers"] if self.name in ("server", "async") else []
        words += ["under guard"] if self.guard is not None else []
        return " ".join(words)

    def can_lose(self, rank: int) -> bool:
        """Whether the others go on when the worker of `rank` is gone. Rank 0 writes, and is never spared."""
        if self.name == "gossip":
            return rank > 0 and self.guard is None  # which may fall back to a sum over all
        elastic = self.name == "async" or (self.name == "server" and self.quorum is not None)
        return elastic and rank >= self.servers and not self.guard_steps
