"""Where a run stands, beside its tensors: what `state.json` of a checkpoint holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from shoal.config import Order
from shoal.config.strategies import DEFAULT
from shoal.errors import UserError
from shoal.tensors import tensor_files

Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """The progress of a run: all that is needed beside the tensors to go on as if it had never stopped."""

    step: Count = 0  # steps done
    position: Count | None = None  # samples used of the endless sequence of epochs; None in earlier versions
    tokens: Count = 0  # labels learnt from
    seconds: float = 0.0  # spent in steps, all attempts together
    shares: list[Count] | None = None  # of the ranks, as last balanced
    nonfinite_steps: Count = 0  # in a row
    nonfinite_total: Count = 0
    scaler: dict[str, float] = field(default_factory=dict)  # of the loss, where there is one
    best: float | None = None  # the best value so far of the metric that the task names
    worse: Count = 0  # evaluations since then
    data: str = ""  # the key of the prepared data
    order: Order = field(default_factory=dict)  # the settings that decide it
    strategy: str = DEFAULT
    island_size: Count = 1  # ranks that held a replica together
    precision: str = ""
    optimizer: str = ""


def load_progress(folder: Path) -> Progress:
    """The progress of a run at a checkpoint. Raises UserError where its state.json does not say."""
    try:
        return TypeAdapter(Progress).validate_json((folder / "state.json").read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"read {folder / 'state.json'}", ": ".join(lines[1:3]), tensor_files.ANOTHER
        ) from error
