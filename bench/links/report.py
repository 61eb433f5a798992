"""What the runs showed, as a Markdown table for each link and as JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.jobs import WINDOW
from bench.links.cells import BASELINE, CELLS
from bench.links.runs import MOVED, WARM_UP, Curve
from bench.report import table
from shoal.config.batch import GLOBAL

MARGIN = 1.02  # the loss to reach, over the one with which DDP ends
SAME_ARITHMETIC = "ddp"

Run = Curve | str  # a run, or why there is none


@dataclass(frozen=True)
class Link:
    """The rate of every host's link, either way; None = nothing limits it."""

    mbit: float | None

    def __str__(self) -> str:
        return "unlimited" if self.mbit is None else f"{self.mbit:g} Mbit/s"

    def seconds(self, sent: float) -> float | None:
        """The time that `sent` bytes need at the least: 8 bits a byte, divided by the rate."""
        return None if self.mbit is None else 8 * sent / (self.mbit * 1e6)


@dataclass
class Results:
    """All turns of all cells on all links."""

    hosts: int
    steps: int
    asked_loss: float | None
    runs: dict[Link, dict[str, list[Run]]] = field(default_factory=dict)

    def add(self, link: Link, cell: str, run: Run) -> None:
        """Keep one more turn."""
        self.runs.setdefault(link, {}).setdefault(cell, []).append(run)

    def curves(self, link: Link, cell: str) -> list[Curve]:
        """The turns that came to their end."""
        return [run for run in self.runs[link].get(cell, []) if isinstance(run, Curve)]

    @property
    def loss(self) -> float:
        """The validation loss to reach: as asked, else `MARGIN` times what the baseline ends with."""
        if self.asked_loss is not None:
            return self.asked_loss
        ends = [curve.losses[-1][1] for link in self.runs for curve in self.curves(link, BASELINE)]
        return MARGIN * median(ends) if ends else float("nan")

    def seconds_to_loss(self, link: Link, cell: str) -> float | None:
        """The median over the turns; None if one of them never came there."""
        times = [curve.seconds_to(self.loss) for curve in self.curves(link, cell)]
        reached = [seconds for seconds in times if seconds is not None]
        return median(reached) if reached and len(reached) == len(times) else None


def one_line(run: Run) -> str:
    """A run that has just ended."""
    if isinstance(run, str):
        return run
    seconds, loss = run.losses[-1]
    return f"loss {loss:.3f} after {seconds:.1f} s, {run.tokens_per_second:,.0f} tokens/s"


def markdown(machine: dict[str, str], results: Results) -> str:
    """The machine, the conditions, and a table for each link."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    parts = [facts, _conditions(results)]
    for link in results.runs:
        parts += [f"### {link}", _table(results, link), *_failures(results, link)]
    return "\n\n".join(parts) + "\n"


COLUMNS = (
    "",
    "s to the loss",
    "lowest - highest",
    "times faster than DDP float32",
    "than DDP bf16",
    "tokens/s",
    "ms a step",
    "of it exposed",
    "link kB a step",
    "bytes / rate, ms",
    "counted kB",
    "loss at the end",
)


def _table(results: Results, link: Link) -> str:
    cells = [cell for cell in results.runs[link] if results.curves(link, cell)]
    return table(COLUMNS, (_row(results, link, cell) for cell in cells))


def _row(results: Results, link: Link, cell: str) -> tuple[str, ...]:
    curves = results.curves(link, cell)

    def middle(quantity: Callable[[Curve], float]) -> float:
        return median(quantity(curve) for curve in curves)

    moved = middle(lambda curve: curve.mean(MOVED))
    counted = middle(lambda curve: curve.mean("perf/comm_bytes"))
    least = link.seconds(moved)
    return (
        cell,
        _number(results.seconds_to_loss(link, cell), ".1f", "never"),
        _spread(results, curves),
        _times(results, link, cell, BASELINE),
        _times(results, link, cell, SAME_ARITHMETIC),
        f"{middle(lambda curve: curve.tokens_per_second):,.0f}",
        f"{middle(lambda curve: curve.mean('perf/step_seconds')) * 1000:,.0f}",
        f"{middle(lambda curve: curve.exposed_seconds) * 1000:,.0f}",
        f"{moved / 1000:,.1f}",
        "" if least is None else f"{least * 1000:,.0f}",
        "" if counted != counted else f"{counted / 1000:,.1f}",
        f"{middle(lambda curve: curve.losses[-1][1]):.3f}",
    )


def _times(results: Results, link: Link, cell: str, rival: str) -> str:
    ours, theirs = (results.seconds_to_loss(link, each) for each in (cell, rival))
    return f"{theirs / ours:.2f}" if ours and theirs else ""


def _spread(results: Results, curves: list[Curve]) -> str:
    times = [seconds for curve in curves if (seconds := curve.seconds_to(results.loss)) is not None]
    return f"{min(times):.1f} - {max(times):.1f}" if times else ""


def _number(value: float | None, form: str, otherwise: str) -> str:
    return otherwise if value is None else format(value, form)


def _failures(results: Results, link: Link) -> list[str]:
    """What did not run, once each, with the reason."""
    whys = {
        (cell, run) for cell, turns in results.runs[link].items() for run in turns if isinstance(run, str)
    }
    return ["\n".join(f"- {cell} did not run: {why}" for cell, why in sorted(whys))] if whys else []


def _conditions(results: Results) -> str:
    turns = max(len(each) for cells in results.runs.values() for each in cells.values())
    return (
        f"{results.hosts} hosts with one worker of 1 thread each; the main job's recipe over {results.steps} "
        f"steps of {GLOBAL * WINDOW:,} tokens; validation loss to reach {results.loss:.3f}; medians of {turns} "
        "turns, taken in turn. Seconds leave out start and validation. Means are over the steps after the "
        f"first {WARM_UP}. Link bytes are what the interface of the busiest host counts, headers included, and "
        "bytes / rate is the time they need at the least; counted bytes are those that shoal's wire counts."
    )


def as_json(machine: dict[str, str], results: Results) -> dict[str, Any]:
    """Everything, each record of each run included."""
    return {
        "machine": machine,
        "hosts": results.hosts,
        "steps": results.steps,
        "loss": results.loss,
        "runs": [
            {
                "link": str(link),
                "cell": cell,
                "settings": vars(CELLS[cell]),
                "turns": [run if isinstance(run, str) else run.records for run in turns],
            }
            for link, cells in results.runs.items()
            for cell, turns in cells.items()
        ],
    }
