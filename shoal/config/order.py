"""Which settings decide the samples of a run and their order, beside the data itself, which is known by its key.

A run that changes none of these goes on exactly from a checkpoint, because its position is counted in samples.
"""

from collections.abc import Mapping

from shoal.config.names import facts
from shoal.config.record import RunConfig

ORDER = ("train.task", "train.seed", "data.sequence_length", "data.packing")

Order = dict[str, bool | int | float | str | None]  # of each of these settings its value


def order_of(config: RunConfig) -> Order:
    """The settings of a run that decide the order of its samples, to be kept with its position."""
    return {key: _value(config, key) for key in ORDER}


def first_change(saved: Mapping[str, object], now: RunConfig) -> tuple[str, object, object] | None:
    """The flag, the value then and the value now of the first setting that differs; None if none does.

    A setting that was not saved did not exist yet, and counts as its default.
    """
    for fact in (fact for fact in facts() if fact.key in ORDER):
        then, here = saved.get(fact.key, fact.info.default), _value(now, fact.key)
        if then != here:
            return fact.flag, then, here
    return None


def _value(config: RunConfig, key: str) -> bool | int | float | str | None:
    section, field = key.split(".")
    value: bool | int | float | str | None = getattr(getattr(config, section), field)
    return value
