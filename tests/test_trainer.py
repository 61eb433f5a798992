"""`shoal.Trainer`: a caller's model and data on the same parts, so under the same laws."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.ports import free_port
from trained import SETTINGS, Plain, accuracy, cross_entropy, model_of, rows_of, trainer_of, weights
from transformers import AutoModelForSequenceClassification

import shoal
from shoal.errors import UserError

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from trained import trainer_of
kind, folder, settings = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
trainer = trainer_of(kind, folder, **settings)
summary = trainer.train()
found = trainer.evaluate()
predicted = trainer.predict(trainer._given.eval) if kind != "llama" else None
trainer.save_model(folder + "/saved")
if trainer._run.mesh.is_first:
    rows = [] if predicted is None else predicted.predictions.tolist()
    with open(folder + "/found.json", "w") as file:
        json.dump({"summary": summary, "evaluated": found, "predictions": rows}, file)
"""


def by_program(folder: Path, kind: str, workers: int, **settings: Any) -> dict[str, Any]:
    """What a script that uses the Trainer found, under so many workers."""
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(Path(__file__).parent),
        kind,
        str(folder),
        json.dumps(settings),
    ]
    port = free_port()
    shared = {**os.environ, "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(workers), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            words,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    said = [process.communicate(timeout=180)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return json.loads((folder / "found.json").read_text())


def plainly(kind: str) -> list[float]:
    """The losses of the steps by a loop of plain PyTorch: the mean over the labels of each step."""
    from shoal.data.batches import Batches
    from shoal.tasks.callers import Samples, default_data_collator

    samples = Samples(rows_of(kind, 21), default_data_collator, kind == "llama")
    batches = Batches(samples, seed=42, global_batch_size=8, micro_batch_size=8)
    model, found = model_of(kind).double().eval(), []
    for step in range(1):
        batch = default_data_collator([rows_of(kind, 21)[i] for i in batches.at(step).ids.flatten()])
        if kind == "plain":
            loss = cross_entropy(model(batch["input_ids"]), batch["labels"], 8)
        else:
            loss = model(**batch).loss
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("bert", {}), ("plain", {}), ("bert", {"strategy": "zero3"})],
    ids=["causal-lm", "classifier", "module", "zero3"],
)
def test_two_workers_follow_one(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    one = by_program(tmp_path / "one", kind, 1)
    two = by_program(tmp_path / "two", kind, 2, **settings)
    first = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(plainly(kind)[0], rel=1e-6)
    for name in ("eval/loss", "tokens", "steps", *(["eval/accuracy"] if kind != "llama" else [])):
        assert one["summary"][name] == pytest.approx(two["summary"][name], rel=1e-9), name
    for each in (one, two):
        assert each["evaluated"] == {k: v for k, v in each["summary"].items() if k.startswith("eval/")}
    np.testing.assert_allclose(one["predictions"], two["predictions"], rtol=1e-9)
    ours, theirs = weights(tmp_path / "one/saved"), weights(tmp_path / "two/final")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12)


def test_here_alone_it_trains_scores_and_is_loaded_by_transformers(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    trainer = trainer_of("bert", str(tmp_path / "run"), callbacks=[heard.append])
    try:
        summary = trainer.train()
        predicted = trainer.predict(rows_of("bert", 13))
    finally:
        trainer.close()
    assert isinstance(summary, shoal.Summary)
    assert summary.steps == 5
    assert predicted.predictions.shape == (13, 2)
    assert (
        predicted.metrics["eval/accuracy"]
        == pytest.approx(accuracy(predicted)["accuracy"])
        == summary["eval/accuracy"]
    )
    assert [record["step"] for record in heard if "train/loss" in record] == [1, 2, 3, 4, 5]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/final").double().eval()
    rows = rows_of("bert", 13)
    scores = loaded(torch.stack([row["input_ids"] for row in rows])).logits
    np.testing.assert_allclose(scores.detach().numpy(), predicted.predictions, rtol=1e-6)


def test_a_callback_ends_the_training(tmp_path: Path) -> None:
    trainer = trainer_of("plain", str(tmp_path / "run"), callbacks=[lambda record: record["step"] == 3])
    try:
        summary = trainer.train()
    finally:
        trainer.close()
    assert 3 <= summary.steps < 5
    assert (tmp_path / "run" / f"checkpoint-{summary.steps}").is_dir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"args": {"tp": 2}}, "--tp 2"),
        ({"args": {"strategy": "allreduce", "sync_every": 4}}, "does not read it"),
        ({"args": {"lerning_rate": 1}}, "lerning_rate"),
        ({"train_dataset": []}, "no row"),
        ({"train_dataset": iter([1])}, "without a length"),
        ({"compute_loss_func": None}, "returns no loss"),
        (
            {"train_dataset": [{"input_ids": torch.zeros(3, dtype=torch.long)}], "compute_loss_func": None},
            "no labels",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    given = {"train_dataset": rows_of("plain", 4), "compute_loss_func": cross_entropy, "args": {}} | change
    args = SETTINGS | {"output_dir": str(tmp_path / "run")} | given.pop("args")
    with pytest.raises(UserError, match=says):  # noqa: PT012
        trainer = shoal.Trainer(Plain(), args, **given)
        try:
            trainer.train()
        finally:
            trainer.close()
    assert not (tmp_path / "run").exists()
