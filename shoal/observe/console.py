"""What a run prints: a banner, lines, and a progress bar on a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.system import output

GIB = 2**30


class Screen:
    """The terminal of rank 0; other ranks print nothing."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self._bar: Progress | None = None
        self._warned = False
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line as it stands, above the progress bar if there is one. Stderr says once if stdout is lost."""
        if not self.speaks:
            return
        self._console.out(text, highlight=False)
        if (error := output.lost()) is not None and not self._warned:
            self._warned = True
            output.say(f"shoal: stdout cannot be written any more ({error.strerror}): going on without it")

    def banner(self, title: str, facts: dict[str, Any]) -> None:
        """Print a title and one fact a line."""
        self.say(f"***** {title} *****")
        for name, value in facts.items():
            self.say(f"  {name} = {value:,}" if isinstance(value, int) else f"  {name} = {value}")

    def start_bar(self, total: int, done: int) -> None:
        """Show a progress bar, if this is a terminal."""
        if self.speaks and self._console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task("train", total=total, completed=done)

    def advance(self, done: int) -> None:
        """Move the progress bar to `done` steps."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def stop_bar(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(record: dict[str, Any], eta_seconds: float) -> str:
    """One step as a line of at most 80 columns, from its record in metrics.jsonl. `wait`: for data and for others."""
    waited = record["perf/data_wait_pct"] + record["perf/comm_pct"]
    return (
        f"step: {record['step']} loss: {record['train/loss']:.4f} grad: {record['train/grad_norm']:.3g} "
        f"lr: {record['train/learning_rate']:.1e} tps: {_short(record['perf/tokens_per_second'])} "
        f"wait: {waited:.0f}% eta: {duration(eta_seconds)}"
    )


def _short(number: float) -> str:
    """In at most six characters: 7,597, 123k, 1.23M."""
    if number < 1e4:
        return f"{number:,.0f}"
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.2f}M"


def shown_number(value: float) -> str:
    """A count whole, anything else in five digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def duration(seconds: float) -> str:
    """For example 1h12m, 3m05s, 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
