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
        "workers, or groups of them by tp, pp and cp, that cut a replica; empty = 1, at a stage of ZeRO all",
        of=" ".join(STAGES),
        ge=1,
    )
    tp: Whole = fact(
        1,
        "workers that cut every layer among them: tensor parallel, with sequence parallel",
        "tensor_parallel_size",
        "tp_size",
        ge=1,
    )
    pp: Whole = fact(
        1,
        "workers in a line that hold the layers one after the other: pipeline parallel",
        "pipeline_parallel_size",
        "pp_size",
        ge=1,
    )
    cp: Whole = fact(
        1,
        "workers that cut every sequence among them: context parallel",
        "context_parallel_size",
        "cp_size",
        ge=1,
    )
    zero_stage: Whole | None = fact(
        None,
        "what they cut: 1 optimizer state, 2 gradients too, 3 parameters too; empty = 3",
        of=" ".join(STAGES),
        ge=1,
        le=3,
    )
