"""What decides the order of the samples: each setting says so, and what cannot go on exactly is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.checkpoint import Progress
from shoal.config import ORDER, dump_yaml, load_config, order_of
from shoal.config.names import facts
from shoal.errors import UserError
from shoal.training.standing import load_standing

# Of a section whose settings all decide nothing of it, the section.
NOTHING = {
    "model", "strategy", "layout", "eval", "checkpoint", "log", "launch", "data.cache_dir",
    "train.learning_rate", "train.lr_scheduler_type", "train.warmup_steps", "train.weight_decay",
    "train.min_lr", "train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.max_grad_norm",
    "train.label_smoothing", "train.optim", "train.precision", "train.gradient_checkpointing", "train.compile",
    "train.exact", "train.threads", "train.max_nonfinite_steps",
}  # fmt: skip
# Where a step or the run ends: from a position any value goes on exactly.
POSITION = {
    "train.max_steps", "train.num_train_epochs", "train.global_batch_size", "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
}  # fmt: skip
# Part of the key of the prepared data, which is refused as a whole where it is another.
DATA = {
    "data.path", "data.text_field", "data.tokenizer", "data.vocab_size", "data.eval_path", "data.eval_fraction",
    "data.split_special_tokens",
}  # fmt: skip


def test_every_setting_says_whether_it_decides_the_order() -> None:
    kinds = {
        fact.key: [kind for kind in (NOTHING, POSITION, DATA, set(ORDER)) if {fact.key, fact.section} & kind]
        for fact in facts()
    }
    wrong = [key for key, found in kinds.items() if len(found) != 1]
    assert not wrong, f"say in one of the sets, or in shoal/config/order.py, what these decide: {wrong}"


def stand(folder: Path, *, then: dict[str, Any] | None = None, now: dict[str, Any], **saved: Any) -> Any:
    """The standing, and what was said, of a checkpoint at step 6 of a run with the settings `then`."""
    path = folder / "checkpoint-6"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps(asdict(Progress(step=6, data="key")) | saved))
    if then is not None:
        (folder / "config.resolved.yaml").write_text(dump_yaml(load_config(None, [], {}, **then)))
        (folder / "environment.json").write_text(json.dumps({"workers": 3}))
    said: list[str] = []
    config = load_config(None, [], {}, **now).config
    return load_standing(path, config, "key", SimpleNamespace(say=said.append)), said  # type: ignore[arg-type]


CHANGES = {
    "seed": (7, 8),
    "sequence_length": (64, 65),
    "task": ("causal-lm", "another"),
    "packing": (True, False),
}


@pytest.mark.parametrize("of_old", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_go_on_exactly_is_refused(tmp_path: Path, name: str, of_old: bool) -> None:
    then, now = ({name: value} for value in CHANGES[name])
    config = load_config(None, [], {}, **then).config
    saved = {} if of_old else {"order": order_of(config), "position": 96}
    recorded = then if of_old else None
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"keep {flag} {then[name]}, or begin a new run.* --model .*/model"):
        stand(tmp_path / "a", then=recorded, now=now, **saved)
    progress, said = stand(tmp_path / "b", then=recorded, now=then, **saved)
    assert (progress.position, said) == (96, [])


def test_the_changes_are_all_there_are() -> None:
    assert {f"{fact.section}.{name}" for name in CHANGES for fact in facts() if fact.field == name} == set(
        ORDER
    )


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    order = order_of(load_config(None, [], {}, seed=7).config)
    del order["data.sequence_length"]
    stand(tmp_path / "a", now={"seed": 7}, order=order, position=1)
    with pytest.raises(UserError, match="keep --sequence-length 256"):
        stand(tmp_path / "b", now={"seed": 7, "sequence_length": 64}, order=order, position=1)


@pytest.mark.parametrize(
    ("then", "position"),
    [
        ({"global_batch_size": 24}, 144),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, 6 * 2 * 5 * 3),
        ({}, 96),
    ],
)
def test_a_checkpoint_of_old_stands_where_its_run_says(
    tmp_path: Path, then: dict[str, Any], position: int
) -> None:
    progress, said = stand(tmp_path, then=then, now={"global_batch_size": 32})
    assert (progress.position, said) == (position, [])


def test_a_checkpoint_of_old_without_its_run_is_said(tmp_path: Path) -> None:
    progress, (line,) = stand(tmp_path, now={})
    assert progress.position is None
    assert "does not say which samples it has used" in line
