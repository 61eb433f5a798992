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
    if options.guard_steps and options.guard is None:
        yield f"--guard-steps {options.guard_steps}", "there is no guard", "add --guard 0.05, or leave it out"
    if options.normalize == "each" and options.name != "allreduce":
        yield (
            "--normalize each",
            f"with {options.name} every worker updates by its own",
            "take --normalize sum",
        )
    if options.codec_momentum and config.train.optim != "sgd":
        found = f"{config.train.optim} would take its momentum a second time"
        yield "--codec-momentum", found, "take --optim sgd, or leave it out"
    if options.delayed_momentum and config.train.optim != "sgd":
        found = f"it takes the place of {config.train.optim}"
        yield "--delayed-momentum", found, "add --optim sgd, or leave it out"
    if options.trim != 0.25 and options.aggregation != "trimmed-mean":
        found = f"the servers take the {options.aggregation}"
        yield f"--trim {options.trim}", found, "add --aggregation trimmed-mean, or leave it out"
