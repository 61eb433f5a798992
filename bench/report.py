"""What was measured, as Markdown for docs/benchmarks.md and as JSON."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from bench.jobs import GLOBAL_BATCH, MICRO_BATCH, PIPELINED_MICRO_BATCH, TIMED, WARM_UP, WINDOW, WORKERS
from bench.rows import Turns, Verdict


def markdown(machine: dict[str, str], verdicts: list[Verdict], turns: Turns, repeats: int) -> str:
    """The machine, the promises, and the runs they are judged by."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    promises = table(
        ("what", "measured", "required", ""),
        ((v.what, v.measured, v.required, "reached" if v.reached else "**short**") for v in verdicts),
    )
    parts = [facts, promises]
    if turns:
        parts += [_conditions(repeats), _runs(turns)]
    return "\n\n".join(parts) + "\n"


def _conditions(repeats: int) -> str:
    return (
        "Every run trains a Llama (hidden 256, 6 layers, 4 heads, intermediate 688, vocabulary 4096, tied) on the "
        f"built-in corpus: {WORKERS} workers with 1 thread each on loopback, {MICRO_BATCH} windows of {WINDOW} "
        f"tokens a worker ({PIPELINED_MICRO_BATCH} in a micro-batch of a pipeline) and {GLOBAL_BATCH} a step, AdamW "
        "(fused), clipping at 1.0. Runs are taken in turn, "
        f"{repeats} turns; of each, {TIMED} steps are timed after {WARM_UP} to warm up; medians over turns. "
        "Windows hold document boundaries: shoal keeps the documents apart, the peers let them see each other, "
        "which is less work. shoal's loss is chunked in every run, and its launcher sets how the C library keeps "
        "freed memory; the peers run as their documentation has it. With defaults, only model, data and batch "
        "are given, and the number of threads is the tool's choice. Memory is the highest of worker 0 (VmHWM); "
        "compiling is timed in the first turn, with an empty cache."
    )


def _runs(turns: Turns) -> str:
    columns = (
        "run",
        "tokens/s",
        "lowest - highest",
        "ms a step",
        "peak MiB a worker",
        "first step s",
        "compile s",
    )
    return table(columns, (_run(str(job), runs) for job, runs in turns.items()))


def _run(name: str, runs: list[Any]) -> tuple[str, ...]:
    speeds = [run.tokens_per_second for run in runs]
    return (
        name,
        f"{median(speeds):,.0f}",
        f"{min(speeds):,.0f} - {max(speeds):,.0f}",
        f"{median(run.step_seconds for run in runs) * 1000:,.0f}",
        f"{median(run.peak_gib for run in runs) * 1024:,.0f}",
        f"{median(run.first_step for run in runs):.1f}",
        f"{runs[0].compile_seconds:.0f}" if "compile" in name else "",
    )


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(machine: dict[str, str], verdicts: list[Verdict], turns: Turns) -> dict[str, Any]:
    """Everything, each step of each run included."""
    return {
        "machine": machine,
        "verdicts": [vars(verdict) for verdict in verdicts],
        "runs": [
            {"job": vars(job), "turns": [{"first_step": r.first_step, "records": r.records} for r in runs]}
            for job, runs in turns.items()
        ],
    }
