"""Options of strategies and codecs that make no sense together are refused before anything is launched."""

from collections.abc import Iterator
from importlib.util import find_spec

from shoal.config.names import facts
from shoal.config.record import RunConfig
from shoal.config.resolve import Resolved
from shoal.config.strategies import SUMMING
from shoal.config.strategy import StrategyConfig
from shoal.errors import UserError

Refusal = tuple[str, str, str]  # what was asked, what was found, what to change


def check_options(resolved: Resolved) -> None:
    """Raises UserError for an option that nothing reads, or that contradicts another."""
    for refusal in (*_unread(resolved), *_contradictions(resolved.config)):
        raise UserError(*refusal)


def _unread(resolved: Resolved) -> Iterator[Refusal]:
    """Options of other strategies and codecs than the chosen: whoever gave one expects it to matter."""
    strategy, train = resolved.config.strategy, resolved.config.train
    chosen = {"strategy": {strategy.name, strategy.codec}, "train": {train.optim}}
    words = {
        "strategy": f"strategy {strategy.name} with codec {strategy.codec}",
        "train": f"optimizer {train.optim}",
    }
    for fact in facts():
        if fact.section not in chosen or not fact.readers or chosen[fact.section] & set(fact.readers):
            continue
        if getattr(getattr(resolved.config, fact.section), fact.field) != fact.info.default:
            origin = resolved.origins[fact.key]
            asked = fact.flag if origin.startswith("flag") else f"{fact.flag} ({origin})"
            found = f"{words[fact.section]} does not read it"
            yield asked, found, f"leave it out; it belongs to {', '.join(fact.readers)}"
    if strategy.traits.is_optimizer and resolved.origins["train.optim"] != "default":
        yield (
            f"--optim {resolved.config.train.optim}",
            f"{strategy.name} is the optimizer itself",
            "leave it out",
        )


def _contradictions(config: RunConfig) -> Iterator[Refusal]:
    options = config.strategy
    if config.eval.quantize != "none":
        yield f"--quantize {config.eval.quantize}", "training does not read it", "give it to shoal evaluate"
    if "tensorboard" in config.log.report_to and find_spec("tensorboard") is None:
        yield "--report-to tensorboard", "the package tensorboard is missing", "pip install tensorboard"
    yield from _bfloat16(config)
    spares = options.traits.spares
    if config.eval.early_stopping_patience and not config.eval.eval_steps:
        yield "--early-stopping-patience", "there is no evaluation but the last", "give --eval-steps too"
    if config.eval.early_stopping_patience and (spares == "beside no server" or options.quorum is not None):
        found = "rank 0 evaluates while the others train on, and they do not hear what it finds"
        yield "--early-stopping-patience", found, "leave it out, or take another --strategy"
    if config.train.exact and (not options.traits.sums_gradients or options.codec != "none"):
        found = f"strategy {options.name} with codec {options.codec} does not add up gradients as they are"
        yield "--exact", found, f"take --strategy {SUMMING} without a codec, or leave --exact out"
    if config.train.exact and (options.clip_each or options.normalize == "each"):
        found = "each worker's own gradient is changed before the sum"
        yield "--exact", found, "leave --exact, or --clip-each and --normalize each, out"
    if (options.group_size is None) != (options.global_every is None):
        yield "--group-size", "only one of it and --global-every is given", "give both, or neither"
    if options.group_size is not None and (options.averaging != "mean" or options.codec != "none"):
        found = f"groups average plainly, not by {options.averaging} with codec {options.codec}"
        yield "--group-size", found, "leave --averaging and --codec out"
    yield from _timing(options)
    if (options.guard_steps or options.guard_drift) and options.guard is None:
        yield "--guard-steps and --guard-drift", "there is no guard", "add --guard 0.05, or leave them out"
    if options.normalize == "each" and not options.traits.sums_gradients:
        yield (
            "--normalize each",
            f"with {options.name} every worker updates by its own",
            "take --normalize sum",
        )
    yield from _eight_bit(config)
    if config.log.memory_report and config.train.compile:
        found = "what a compiled graph holds within it cannot be seen"
        yield "--memory-report", found, "leave --compile out, or the report"
    if config.log.memory_report and options.traits.is_central:
        found = f"with {options.name} the optimizer computes in the threads of servers, which cannot be seen"
        yield "--memory-report", found, "take another strategy, or leave it out"
    if config.layout.offload == "optimizer" and not options.traits.keeps_optimizer:
        found = f"with {options.name} a worker keeps no state of an optimizer"
        yield "--offload optimizer", found, "leave it out, or take another strategy"
    yield from _momentum(config)
    yield from _codec(options)
    yield from _outer(options)
    if options.delayed_momentum and config.train.optim != "sgd":
        found = f"it takes the place of {config.train.optim}"
        yield "--delayed-momentum", found, "add --optim sgd, or leave it out"
    if options.trim != 0.25 and options.aggregation != "trimmed-mean":
        found = f"the servers take the {options.aggregation}"
        yield f"--trim {options.trim}", found, "add --aggregation trimmed-mean, or leave it out"


def _bfloat16(config: RunConfig) -> Iterator[Refusal]:
    """What `--precision bf16-true` is refused with."""
    if config.train.precision != "bf16-true":
        return
    mixed = "or --precision bf16-mixed"
    if not config.train.optimizer.rounds_by_chance:
        found = f"{config.train.optim} would round small updates of bf16 parameters away"
        yield "--precision bf16-true", found, f"take --optim adamw, {mixed}"
    if not config.strategy.traits.sums_gradients:
        found = f"what {config.strategy.name} shares would be rounded to bf16 at each agreement"
        yield "--precision bf16-true", found, f"take --strategy {SUMMING}, zero1, zero2 or zero3, {mixed}"


def _eight_bit(config: RunConfig) -> Iterator[Refusal]:
    """What an optimizer with 8-bit state is refused with."""
    if not config.train.optimizer.in_codes:
        return
    asked = f"--optim {config.train.optim}"
    if config.train.precision == "64-true":
        yield asked, "it computes in float32", "take adamw, or leave --precision 64-true out"
    if config.strategy.traits.is_central:
        found = f"with {config.strategy.name} the servers hold the optimizer's state, once for all"
        yield asked, found, "take adamw"
    if config.strategy.guard is not None:
        found = "the guard falls back to the mean of the replicas' state, and codes have none"
        yield "--guard", found, "take --optim adamw, or leave it out"


def _momentum(config: RunConfig) -> Iterator[Refusal]:
    """Where the codec and the optimizer would both apply a momentum, or neither."""
    options, optim, whose = config.strategy, config.train.optim, config.train.optimizer.momentum
    if whose == "the codec's":
        needed = {
            f"--strategy {SUMMING}": options.traits.sums_gradients,
            "--codec sign": options.codec == "sign",
            "--codec-momentum 0.9": options.codec_momentum > 0,
            "--codec-warmup 100": options.codec_warmup > 0,
            "--max-grad-norm 0": config.train.max_grad_norm == 0,
            "--normalize no": options.normalize == "no",
        }
        missing = " ".join(flag for flag, given in needed.items() if not given)
        if missing:
            yield f"--optim {optim}", "it is handed a momentum, encoded and whole", f"add {missing}"
        return
    if not options.codec_momentum:
        return
    if whose == "own":
        found = f"{optim} would take its momentum a second time"
        yield "--codec-momentum", found, "take --optim sgd or onebit-adam, or leave it out"
    if options.traits.sends == "deltas":
        yield "--codec-momentum", "what is sent are ways of many steps, no gradients", "leave it out"
    if options.codec == "sign" and options.traits.is_central:
        found = "servers are sent gradients, and the momentum of sign is that of all ranks"
        yield "--codec-momentum", found, "leave it out"


def _timing(options: StrategyConfig) -> Iterator[Refusal]:
    """Periods, fragments and overlaps of syncs that do not fit each other."""
    every, overlap = options.sync_every or options.traits.period, options.overlap_steps or 0
    if not every:
        return
    if (options.fragments > 1 or overlap) and not every.isdigit():
        yield f"--sync-every {every}", "fragments and overlap are timed in steps", "give a number of steps"
    elif options.fragments > int(every if every.isdigit() else options.fragments):
        found = f"there are only {every} steps for them"
        yield f"--fragments {options.fragments}", found, f"take at most {every}"
    elif every.isdigit() and overlap >= int(every):
        found = f"the next sync starts after {every} steps"
        yield f"--overlap-steps {overlap}", found, f"take at most {int(every) - 1}"


def _codec(options: StrategyConfig) -> Iterator[Refusal]:
    """Codec options that the strategy cannot apply."""
    given = {
        "--error-feedback": options.error_feedback is not None,
        "--error-decay": options.error_decay != 1,
        "--codec-momentum": options.codec_momentum,
        "--codec-warmup": options.codec_warmup,
    }
    for flag in ("--error-feedback", "--error-decay") if options.codec == "none" else ():
        if given[flag]:
            yield flag, "nothing is encoded, and so nothing left out", "add --codec, or leave it out"
    if options.traits.sends == "differences":
        for flag in (flag for flag, is_given in given.items() if is_given):
            found = f"{options.name} encodes differences to what was sent, which bring back what is left out"
            yield flag, found, "leave it out"
    if options.codec_warmup and options.traits.is_central:
        found = f"strategy {options.name} sends from one rank to another, where lengths must be known"
        yield f"--codec-warmup {options.codec_warmup}", found, "leave it out"


def _outer(options: StrategyConfig) -> Iterator[Refusal]:
    """An outer rate or momentum without an outer rule that uses it."""
    given = {
        "--outer-lr": options.outer_lr is not None,
        "--outer-momentum": options.outer_momentum is not None,
    }
    if "averaging" in options.traits.options and options.averaging == "mean":
        for flag in (flag for flag, is_given in given.items() if is_given):
            yield flag, "the plain mean of the replicas reads none", "add --averaging slowmo, or leave it out"
    if options.averaging == "elastic" and given["--outer-momentum"]:
        yield "--outer-momentum", "elastic averaging reads none", "take --averaging slowmo, or leave it out"
