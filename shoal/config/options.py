"""Options of strategies and codecs that make no sense together are refused before anything is launched."""

from collections.abc import Iterator

from shoal.config.names import facts
from shoal.config.record import RunConfig
from shoal.config.resolve import Resolved
from shoal.errors import UserError

Refusal = tuple[str, str, str]  # what was asked, what was found, what to change


def check_options(resolved: Resolved) -> None:
    """Raises UserError for an option that nothing reads, or that contradicts another."""
    for refusal in (*_unread(resolved), *_contradictions(resolved.config)):
        raise UserError(*refusal)


def _unread(resolved: Resolved) -> Iterator[Refusal]:
    """Options of other strategies and codecs than the chosen: whoever gave one expects it to matter."""
    strategy = resolved.config.strategy
    for fact in facts():
        read = not fact.readers or {strategy.name, strategy.codec} & set(fact.readers)
        if not read and getattr(strategy, fact.field) != fact.info.default:
            asked = f"{fact.flag} ({resolved.origins[fact.key]})"
            found = f"strategy {strategy.name} with codec {strategy.codec} does not read it"
            yield asked, found, f"leave it out; it belongs to {', '.join(fact.readers)}"


def _contradictions(config: RunConfig) -> Iterator[Refusal]:
    options = config.strategy
    if config.train.exact and (options.name != "allreduce" or options.codec != "none"):
        found = f"strategy {options.name} with codec {options.codec} does not add up gradients as they are"
        yield "--exact", found, "take --strategy allreduce without a codec, or leave --exact out"
    if config.train.exact and (options.clip_each or options.normalize == "each"):
        found = "each worker's own gradient is changed before the sum"
        yield "--exact", found, "leave --exact, or --clip-each and --normalize each, out"
    if (options.group_size is None) != (options.global_every is None):
        yield "--group-size", "only one of it and --global-every is given", "give both, or neither"
    if options.group_size is not None and (options.averaging != "mean" or options.codec != "none"):
        found = f"groups average plainly, not by {options.averaging} with codec {options.codec}"
        yield "--group-size", found, "leave --averaging and --codec out"
    every = options.sync_every or ""
    in_parts = options.fragments > 1 or bool(options.overlap_steps)
    if in_parts and not (every.isdigit() or not every):
        yield f"--sync-every {every}", "fragments and overlap are timed in steps", "give a number of steps"
    if every.isdigit() and options.fragments > int(every):
        found = f"there are only {every} steps for them"
        yield f"--fragments {options.fragments}", found, f"take at most {every}"
    if every.isdigit() and (options.overlap_steps or 0) >= int(every):
        found = f"the next sync starts after {every} steps"
        yield f"--overlap-steps {options.overlap_steps}", found, f"take at most {int(every) - 1}"
    if (options.guard_steps or options.guard_drift) and options.guard is None:
        yield "--guard-steps and --guard-drift", "there is no guard", "add --guard 0.05, or leave them out"
    if options.normalize == "each" and options.name != "allreduce":
        yield (
            "--normalize each",
            f"with {options.name} every worker updates by its own",
            "take --normalize sum",
        )
    yield from _momentum(config)
    if options.name == "local" and options.averaging == "mean":
        for flag, given in (("--outer-lr", options.outer_lr), ("--outer-momentum", options.outer_momentum)):
            if given is not None:
                yield (
                    flag,
                    "the plain mean of the replicas reads none",
                    "add --averaging slowmo, or leave it out",
                )
    if options.averaging == "elastic" and options.outer_momentum is not None:
        yield "--outer-momentum", "elastic averaging reads none", "take --averaging slowmo, or leave it out"
    if options.codec_warmup and options.name in ("server", "async"):
        found = f"strategy {options.name} sends from one rank to another, where lengths must be known"
        yield f"--codec-warmup {options.codec_warmup}", found, "leave it out"
    if options.delayed_momentum and config.train.optim != "sgd":
        found = f"it takes the place of {config.train.optim}"
        yield "--delayed-momentum", found, "add --optim sgd, or leave it out"
    if options.trim != 0.25 and options.aggregation != "trimmed-mean":
        found = f"the servers take the {options.aggregation}"
        yield f"--trim {options.trim}", found, "add --aggregation trimmed-mean, or leave it out"


def _momentum(config: RunConfig) -> Iterator[Refusal]:
    """Of the codec and of the optimizer: one of them takes it."""
    options, optim = config.strategy, config.train.optim
    if optim == "onebit-adam":
        needed = {
            "--strategy allreduce": options.name == "allreduce",
            "--codec sign": options.codec == "sign",
            "--codec-momentum 0.9": options.codec_momentum > 0,
            "--codec-warmup 100": options.codec_warmup > 0,
            "--max-grad-norm 0": config.train.max_grad_norm == 0,
        }
        missing = " ".join(flag for flag, given in needed.items() if not given)
        if missing:
            yield (
                "--optim onebit-adam",
                "it is handed a momentum that is encoded after a warm-up",
                f"add {missing}",
            )
    elif options.codec_momentum and options.codec == "sign" and options.name in ("server", "async"):
        found = "servers are sent gradients, and the momentum of sign is that of all ranks"
        yield "--codec-momentum", found, "leave it out"
    elif options.codec_momentum and optim != "sgd":
        found = f"{optim} would take its momentum a second time"
        yield "--codec-momentum", found, "take --optim sgd or onebit-adam, or leave it out"
