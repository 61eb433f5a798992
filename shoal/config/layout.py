"""Where the tensors of one replica live: the ranks as a grid."""

from shoal.config.section import Section, fact
from shoal.config.values import Whole

# The names by which people ask for a stage as a strategy.
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}


class LayoutConfig(Section):
    """Where the tensors of a replica live. The sizes multiply to the number of workers."""

    dp_replicate: Whole | None = fact(
        None,
        "replicas; empty = as many as the other sizes leave workers for",
        of=" ".join(STAGES),
        ge=1,
    )
    dp_shard: Whole | None = fact(
        None,
        "workers that hold a replica together; empty = 1, at a stage of ZeRO all",
        of=" ".join(STAGES),
        ge=1,
    )
    zero_stage: Whole | None = fact(
        None,
        "what they cut: 1 optimizer state, 2 gradients too, 3 parameters too; empty = 3",
        of=" ".join(STAGES),
        ge=1,
        le=3,
    )
