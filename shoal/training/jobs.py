"""The jobs of a worker: a whole training run, or an evaluation."""

import json
import platform
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from shoal.checkpoint import load_model
from shoal.config import Resolved, dump_yaml
from shoal.errors import UserError, described, printable
from shoal.layouts.base import bytes_sent, shape_of
from shoal.models.quantize import quantize, weight_bytes
from shoal.observe.console import GIB, Screen, duration, shown_number
from shoal.observe.memory import Report
from shoal.optim.optimizers import state_bytes
from shoal.sync import cost_of
from shoal.system.run_folder import CONFIG, ENVIRONMENT, SUMMARY, RunFolder
from shoal.tasks import Entry
from shoal.training.assemble import assemble
from shoal.training.evaluate import evaluate_model, everyone
from shoal.training.loop import train
from shoal.training.model import BuiltModel, build_model
from shoal.training.recorder import peak_rss_gib
from shoal.training.run import Run
from shoal.wire.mesh import Mesh
from shoal.wire.waits import WAITS

MIB = 2**20
SHOWN_HOSTS = 8


class Stop(Protocol):
    """Whether the run was asked to stop."""

    def __call__(self) -> bool: ...

    def hold(self, tell: Callable[[], None], stuck: Callable[[], str] = str) -> None:
        """From now on there is something to save before leaving. `tell` is called when the run is asked to stop.

        `stuck` returns, in words, what this rank waits for in vain; nothing where it does not.
        """
        ...


def train_job(resolved: Resolved, mesh: Mesh, data: Path, stop: Stop) -> None:
    """Train to the end and leave a finished folder: metrics, checkpoints, the exported model and a summary."""
    train_run(begin_run(resolved, mesh, data), resolved, stop)


def begin_run(resolved: Resolved, mesh: Mesh, data: Path, entry: Entry | None = None) -> Run:
    """Assemble a run, and keep other runs out of its folder; `entry` is its task if that is not `--task`."""
    screen = Screen(speaks=mesh.is_first)
    place = RunFolder(Path(resolved.config.checkpoint.output_dir))
    if mesh.is_first and place.is_marked and not resolved.config.checkpoint.begins_anew:
        place.hold(screen.say)  # before a checkpoint is read there
    return assemble(resolved.config, mesh, data, screen, entry)


def train_run(run: Run, resolved: Resolved, stop: Stop) -> None:
    """Train a run to its end, and leave its folder finished."""
    place = RunFolder(run.folder)
    if run.mesh.is_first:
        _begin_folder(run, resolved, place)
    run.mesh.wire("world").wait_for_first()
    if run.mesh.is_first:  # it may ask the hub
        name = run.config.log.run_name
        run.screen.banner(f"Running training{': ' if name else ''}{name}", _facts(run))
        for remark in _remarks(run):
            run.screen.say(f"shoal: {remark}")
    WAITS.step = run.progress.step + 1
    pulse = run.mesh.pulse
    stop.hold(lambda: run.sync.members.wish(), pulse.stuck if pulse else str)
    metrics = train(run, stop)
    with run.sync.shared_model(run.replica):
        if run.mesh.is_first:
            _finish_folder(run, resolved, place, _summary(run, metrics))


def evaluate_job(resolved: Resolved, mesh: Mesh, data: Path, stop: Stop) -> dict[str, float] | None:
    """Evaluate the model on the held-out data; rank 0 returns the metrics."""
    screen = Screen(speaks=mesh.is_first)
    built = build_model(resolved.config, mesh, data, screen)
    if built.checkpoint is not None:
        load_model(built.checkpoint, built.placed, None)
        screen.say(
            f"loaded {built.checkpoint}: {built.standing.step} steps, {built.standing.tokens:,} tokens"
        )
    metrics = _of_all(built, stop)
    if resolved.config.eval.quantize != "none" and metrics:
        metrics = _quantized(built, metrics, stop)
    return metrics if mesh.is_first else None


JOBS: dict[str, Callable[[Resolved, Mesh, Path, Stop], Any]] = {"train": train_job, "evaluate": evaluate_job}


def _of_all(built: BuiltModel, stop: Stop) -> dict[str, float] | None:
    """The metrics of a model that is the same on all replicas, measured by all of them."""
    return evaluate_model(built, everyone(built.mesh), stop)


def _quantized(built: BuiltModel, whole: dict[str, float], stop: Stop) -> dict[str, float] | None:
    """The metrics after the weights are quantised, with those of the `whole` weights beside them."""
    model = built.placed.model
    before = weight_bytes(model)
    quantize(model, built.config.eval.quantize)
    metrics = _of_all(built, stop)
    if metrics is None:
        return None
    perplexity = whole["eval/perplexity"]
    return {
        **metrics,
        "eval/perplexity_unquantized": perplexity,
        "eval/perplexity_loss": metrics["eval/perplexity"] - perplexity,
        "eval/weight_bytes": weight_bytes(model),
        "eval/weight_bytes_unquantized": before,
    }


def _begin_folder(run: Run, resolved: Resolved, place: RunFolder) -> None:
    """Make the folder this run's, now that everything fits. Only here is an earlier run removed."""
    _check_room(run)
    owner = place.begin(
        anew=run.config.checkpoint.begins_anew,
        overwrite=run.config.checkpoint.overwrite_output_dir,
        ranks=run.mesh.world_size,
        say=run.screen.say,
    )
    run.saver.checkpoints.belong_to(owner)
    (run.folder / CONFIG).write_text(dump_yaml(resolved))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    machine = {"host": platform.node(), "system": platform.platform(), "workers": run.mesh.world_size}
    (run.folder / ENVIRONMENT).write_text(json.dumps(versions | machine, indent=1))


def _check_room(run: Run) -> None:
    """Raise UserError where the disk has no room for two checkpoints, beside what an earlier run leaves it."""
    folder, replica = run.folder, run.replica
    share = sum(piece.local.numel() for piece in replica.placed.pieces)
    whole = sum(piece.shape.numel() for piece in replica.placed.pieces)
    weights = sum(piece.shape.numel() * piece.local.element_size() for piece in replica.placed.pieces)
    wanted = 2 * (weights + state_bytes(replica.optimizers) * whole // max(1, share))
    there = next(place for place in (folder, *folder.parents) if place.exists())
    room = shutil.disk_usage(there).free
    if run.config.checkpoint.overwrite_output_dir:
        room += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if room < wanted:
        found = f"two checkpoints take {wanted / 1e9:,.3g} GB, {room / 1e9:,.3g} GB are free"
        raise UserError(f"--output-dir {folder}", found, "free some space, or name a folder elsewhere")


def _facts(run: Run) -> dict[str, Any]:
    config, replica = run.config, run.replica
    weights = run.built.surroundings.weights() or f"random, from seed {config.train.seed}"
    accumulation = max(replica.shares.counts)
    return {
        "Model": "; ".join(
            [
                f"{config.model.name}, {_trainable(run):,} trainable parameters",
                *run.built.surroundings.remarks(),
            ]
        ),
        "Weights": weights,
        "Learning rate": f"{config.train.learning_rate:g}, {config.train.lr_scheduler_type}",
        "Num examples": len(run.batches.samples),
        "Num eval examples": len(run.task.samples("eval"))
        or "0: nothing is held out, so nothing is evaluated",
        "Instantaneous batch size per device": run.batches.shape[1],
        "Total train batch size (w. parallel, distributed & accumulation)": run.batches.global_batch_size,
        "Gradient accumulation steps": accumulation
        if run.balancer.off
        else f"{accumulation}, until --balance moves them",
        "Total optimization steps": run.total_steps,
        "Workers": f"{run.mesh.world_size} x {torch.get_num_threads()} threads on {run.mesh.device.type}",
        **_network(run.mesh),
        "Layout": _layout(run),
        "Strategy": _strategy(run),
        "Precision": str(replica.policy),
        "Output": str(run.folder),
    }


def _remarks(run: Run) -> Iterator[str]:
    """What a user may not have meant."""
    train = run.config.train
    if train.warmup_steps >= max(1, run.total_steps):
        found = (
            f"all {run.total_steps:,} steps are warm-up: the rate never falls, and may not reach its highest"
        )
        yield f"--warmup-steps {train.warmup_steps:g}: {found}"
    if run.config.eval.eval_steps >= run.total_steps > 0:
        yield f"--eval-steps {run.config.eval.eval_steps}: the only evaluation is the one after the last step"


def _network(mesh: Mesh) -> dict[str, str]:
    """The interface by which this rank reaches those on other hosts, where there are any."""
    if len({host.machine for host in mesh.hosts}) < 2:
        return {}
    names = list(dict.fromkeys(host.name for host in mesh.hosts))
    shown = ", ".join(names[:SHOWN_HOSTS]) + (" ..." if len(names) > SHOWN_HOSTS else "")
    return {"Network": f"{mesh.interface or 'chosen by torch'}, {len(names)} hosts: {shown}"}


def _layout(run: Run) -> str:
    """The layout, and the bytes that its workers send each other in a step."""
    placed = run.replica.placed
    sent = bytes_sent(placed, run.replica.turns, shape_of(run.batches.at(run.progress.step).micro_batch(0)))
    return f"{placed}" + (f", {sent / 1e6:,.3g} MB sent by each within it in a step" if sent else "")


def _strategy(run: Run) -> str:
    """The strategy, and its expected cost in a step; the summary has the bytes that were sent."""
    options = run.config.strategy
    cost = cost_of(run.config, run.replica)
    words = [options.name, *(["exact"] if run.config.train.exact else [])]
    words += [f"codec {options.codec}"] if options.codec != "none" else []
    words += [f"{cost.sent / 1e6:,.3g} MB sent by each worker in an average step"]
    words += [f"{cost.held / 1e6:,.3g} MB held for it"] if cost.held else []
    words += [f"up to {cost.staleness} steps stale"] if cost.staleness else []
    return ", ".join(words)


def _trainable(run: Run) -> int:
    pieces = run.replica.placed.pieces
    return sum(piece.shape.numel() for piece in pieces if piece.source.requires_grad)


def _summary(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    usage, pulse = resource.getrusage(resource.RUSAGE_SELF), run.mesh.pulse
    return {
        "steps": run.progress.step,
        "tokens": run.progress.tokens,
        **metrics,
        "seconds": run.progress.seconds,
        "tokens_per_second": run.progress.tokens / max(run.progress.seconds, 1e-9),
        "workers": run.mesh.world_size,
        "cpu_seconds_per_worker": usage.ru_utime + usage.ru_stime,
        **(
            {"cpu_seconds_of_pulse": pulse.processor_seconds, "pulse_longest_gap": pulse.longest_gap}
            if pulse
            else {}
        ),
        "bytes_sent_per_worker": run.bytes_sent,
        "peak_rss_gib_per_worker": peak_rss_gib(),
        "skipped_steps": run.progress.nonfinite_total,
        "parameters": _trainable(run),
        **({"run_name": run.config.log.run_name} if run.config.log.run_name else {}),
        "strategy": run.config.strategy.name,
        "precision": run.replica.policy.name,
        "seed": run.config.train.seed,
    } | ({"memory": run.memory.report} if run.memory.report else {})


def _finish_folder(run: Run, resolved: Resolved, place: RunFolder, summary: dict[str, Any]) -> None:
    """Export the model, then write the summary, which marks the run as finished; then show the results."""
    for optimizer in run.replica.optimizers:
        optimizer.state.clear()  # it is saved, and the export wants room
    model = None if run.replica.is_cut else run.replica.model  # this rank alone never makes a cut one whole
    chosen = {key: origin for key, origin in resolved.origins.items() if origin != "default"}
    settings = {key: _setting(resolved, key) for key in ("model.name", "data.path", *chosen)}
    last = run.folder / f"checkpoint-{run.progress.step}"
    policy = run.replica.policy
    plain = model if policy.linear == policy.compute else None  # what rounds its products has other logits
    aside = place.aside("final")
    run.built.surroundings.export(last, aside, {**summary, "Settings": settings}, plain)
    place.put(aside, "final")
    (run.folder / SUMMARY).write_text(json.dumps(summary, indent=1))
    if model is not None:
        _show_sample(run, model)
    facts = {
        "Steps": summary["steps"],
        "Tokens": summary["tokens"],
        "Time": f"{duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens per second",
        "Processor time": f"{duration(summary['cpu_seconds_per_worker'])} of each worker",
        "Peak memory": f"{summary['peak_rss_gib_per_worker']:.2f} GiB of each worker",
        "Sent": f"{summary['bytes_sent_per_worker'] / 1e6:,.1f} MB by each worker",
        **{name: shown_number(value) for name, value in summary.items() if name.startswith("eval/")},
        "Model": str(run.folder / "final"),
        **({"A sample of text": f"shoal generate {run.folder} --prompt ..."} if model is None else {}),
    }
    run.screen.banner("Finished", facts)
    if run.memory.report:
        run.screen.banner(
            "Memory of worker 0 at the peak of a step", _shown_memory(run.memory.report, run.mesh.device)
        )


def _show_sample(run: Run, model: Any) -> None:
    try:
        sample = run.built.surroundings.example(model)
    except Exception as error:  # of whatever kind: the run is done, and well
        run.screen.say(f"there is no sample of text: {described(error)}")
        return
    if sample:  # of a model that has learnt little it may hold what moves a terminal's cursor
        shown = "\n".join(printable(line.expandtabs()) for line in sample.splitlines())
        run.screen.say(f"***** A sample of generated text *****\n{shown}\n*****")


def _shown_memory(memory: Report, device: torch.device) -> dict[str, str]:
    """The memory report as lines: bytes held by tensors, their formula, and what the process held beside them."""
    lines, total = {}, 0
    for part, each in memory.items():
        measured, formula = each["bytes"] or 0, each["formula"]
        total += measured
        lines[part] = f"{measured / MIB:,.2f} MiB" + (f", by formula {formula / MIB:,.2f}" if formula else "")
    most = torch.cuda.max_memory_reserved() if device.type == "cuda" else peak_rss_gib() * GIB
    return lines | {
        "all tensors": f"{total / MIB:,.2f} MiB",
        "beside them": f"{(most - total) / MIB:,.0f} MiB: the program, its libraries, and what the allocator keeps",
    }


def _setting(resolved: Resolved, key: str) -> Any:
    section, field = key.split(".", 1)
    return getattr(getattr(resolved.config, section), field)
