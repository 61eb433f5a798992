"""How replicas agree: the settings of every strategy and codec. Each belongs to those that read it."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from shoal.config.codecs import CODECS
from shoal.config.section import Section, fact
from shoal.config.strategies import DEFAULT, STRATEGIES, Traits
from shoal.config.values import Number, Period, Shares, Whole, renamed

ALIASES = {alias: name for name, traits in STRATEGIES.items() for alias in traits.aliases}


class StrategyConfig(Section):
    """How the replicas agree. An empty option is the strategy's or codec's own; one that is not read is refused."""

    primary: ClassVar[str] = "name"

    name: Annotated[str, BeforeValidator(renamed(ALIASES))] = fact(DEFAULT, "the way to synchronise")
    bucket_mb: Number = fact(
        4.0, "megabytes (10^6 bytes) of gradients reduced at once", "bucket_cap_mb", gt=0
    )
    balance: Shares = fact(
        "auto", "shares of the micro-batches: auto = by measured speed, off = equal, or 3,1"
    )

    sync_every: Period | None = fact(
        None, "steps between two syncs; or 100ktokens; or end = once", "outer_every"
    )
    outer_lr: Number | None = fact(None, "rate of the outer update", gt=0)
    outer_momentum: Number | None = fact(None, "momentum of the outer update", ge=0, lt=1)
    averaging: Literal["mean", "slowmo", "bmuf", "elastic"] = fact("mean", "the outer rule of local")
    local_after: Whole = fact(0, "steps of synchronous training before the local ones", ge=0)
    group_size: Whole | None = fact(
        None, "ranks that sync every sync_every; all of them every global_every", ge=1
    )
    global_every: Whole | None = fact(None, "steps between two syncs of all groups", ge=1)
    fragments: Whole = fact(1, "parts of the model, synced one after the other", ge=1)
    overlap_steps: Whole | None = fact(
        None,
        "steps for which what is sent may travel: diloco 0; gossip 1, with 0 it mixes after the update",
        ge=0,
    )
    mixing: Number | None = fact(
        None,
        "share of what was agreed on in what a replica goes on with; diloco 1, gossip by its codec",
        gt=0,
        le=1,
    )
    topology: Literal["ring", "exponential", "push-sum"] | None = fact(
        None, "who averages with whom; empty = exponential"
    )

    servers: Whole = fact(1, "ranks that hold a part of the parameters as servers", ge=1)
    aggregation: Literal["mean", "trimmed-mean", "median"] = fact(
        "mean", "how a server merges the gradients of the workers"
    )
    trim: Number = fact(0.25, "share of the workers that trimmed-mean leaves out at each end", gt=0, lt=0.5)
    quorum: Whole | None = fact(
        None, "workers that an update waits for, the others are backups; empty = all", ge=1
    )
    max_staleness: Whole | None = fact(
        None, "steps that a worker may be ahead of the last one; empty = any number", ge=0
    )
    collect: Whole = fact(1, "pushes that make an update; 1 = each on arrival", ge=1)
    staleness_lr: bool = fact(False, "divide the rate of a push by its staleness")
    delay_compensation: Number = fact(0.0, "lambda of DC-ASGD, as 0.04; 0 = off", ge=0)
    delayed_momentum: Whole = fact(
        0,
        "pushes between two updates of a delayed Nesterov momentum, as many as workers; 0 = off",
        ge=0,
    )
    share_memory: bool = fact(True, "hand tensors over in memory where worker and server run on one machine")

    normalize: Literal["no", "sum", "each"] = fact(
        "no",
        "divide the gradient by its norm: sum = that of all workers, each = every worker its own",
    )
    clip_each: Number = fact(
        0.0, "the norm every worker clips its own gradient to before the sum; 0 = off", ge=0
    )

    guard: Number | None = fact(
        None,
        "share by which the loss may rise before the guard acts, such as 0.05; empty = no guard",
        gt=0,
    )
    guard_drift: Number | None = fact(
        None,
        "share of their norm by which replicas may differ before the guard acts; empty = any",
        gt=0,
    )
    guard_steps: Whole = fact(
        0,
        "synchronous steps at the start, for the guard to compare with",
        ge=0,
    )

    codec: Literal[*CODECS] = fact("none", "how what is sent is encoded")  # type: ignore[valid-type]
    error_feedback: bool | None = fact(
        None, "carry what a codec left out into the next step; empty = where it is biased"
    )
    error_decay: Number = fact(
        1.0,
        "what is left of that error from one step to the next, such as SparseLoCo's 0.95",
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

    demo_decay: Number = fact(0.999, "of the decoupled momentum", ge=0, lt=1)
    demo_chunk: Whole = fact(64, "the side of the blocks that are transformed", ge=1)
    demo_topk: Whole = fact(32, "coefficients of a block that are sent", ge=1)

    @property
    def traits(self) -> Traits:
        """The traits of the strategy; defaults for a name that is not in the table."""
        return STRATEGIES.get(self.name, Traits())

    @property
    def remembers(self) -> str:
        """The settings that saved state depends on, as text: state saved under another text is not loaded."""
        words = [self.name]
        words += [self.averaging] if self.averaging != "mean" else []
        words += [self.topology] if self.topology is not None else []
        if self.codec != "none":
            words.append(f"with {self.codec} in {self.bucket_mb:g} MB")
            words += [f"of rank {self.rank}"] if self.codec == "powersgd" else []
            words += [f"for {self.servers} servers"] if self.traits.is_central else []
        words += ["under guard"] if self.guard is not None else []
        return " ".join(words)

    def can_lose(self, rank: int) -> bool:
        """Whether the other workers go on when worker `rank` dies. Rank 0 writes the run, and is never spared."""
        match self.traits.spares:
            case "none":
                return False
            case "workers":
                return rank > 0 and self.guard is None  # which may fall back to a sum over all
            case "beside no server, with a quorum" if self.quorum is None:
                return False
        return rank >= self.servers and not self.guard_steps
