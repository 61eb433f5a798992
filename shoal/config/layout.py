"""Where the tensors of one replica live: the ranks as a grid."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from shoal.config.section import Section, fact
from shoal.config.values import Whole, renamed

# The names by which people ask for a stage as a strategy.
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}

Schedule = Literal[
    "gpipe",
    "1f1b",
    "interleaved-1f1b",
    "looped-bfs",
    "interleaved-zero-bubble",
    "zbv-zero-bubble",
    "dualpipev",
]
ONE_STAGE = ("gpipe", "1f1b")  # on each worker
# A backward pass for the inputs, which the stage before waits for, and one for the weights.
SPLIT = ("interleaved-zero-bubble", "zbv-zero-bubble", "dualpipev")
THERE_AND_BACK = ("zbv-zero-bubble", "dualpipev")  # two, of which the first worker has the first and the last


def _schedule(given: Any) -> Any:
    """As torch and torchtitan spell it too: Interleaved1F1B."""
    compact = {name.replace("-", ""): name for name in get_args(Schedule)}
    return renamed(compact)(given.lower().replace("-", "")) if isinstance(given, str) else given


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
    pp_schedule: Annotated[Schedule, BeforeValidator(_schedule)] | None = fact(
        None,
        "order of their forward and backward passes; empty = 1f1b",
        "pipeline_parallel_schedule",
    )
    pp_virtual_stages: Whole | None = fact(
        None,
        "stages on each of them; empty = 2 under schedules of several, else 1",
        "num_virtual_stages_per_pipeline_rank",
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

    offload: Literal["none", "optimizer", "parameters"] = fact(
        "none",
        "held by the host in place of the GPU: optimizer = its state; parameters = they, gradients and state (zero3)",
    )

    @property
    def schedule(self) -> str:
        """The schedule of a pipeline."""
        return self.pp_schedule or "1f1b"

    @property
    def stages_per_worker(self) -> int:
        """How many stages each worker of a pipeline holds."""
        return self.pp_virtual_stages or (1 if self.schedule in ONE_STAGE else 2)
