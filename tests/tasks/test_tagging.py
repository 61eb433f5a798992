"""A second task, with draws by epoch, predictions and a metric of its own, is exact under every layout."""

import json
from typing import Any

import pytest
from laws.pool import Pool
from laws.worlds import run_of
from tagging import Tagging

from shoal.errors import UserError
from shoal.training.loop import train
from shoal.wire.mesh import Mesh

TASK = Tagging("llama", dropout=0.1, size=13)
STEPS = {"precision": "64-true", "global_batch_size": 8, "per_device_train_batch_size": 2, "eval_steps": 2}
EPOCHS = {"max_steps": 5}  # of 13 rows: three epochs are begun
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "of-2": (2, {}),
    "of-4": (4, {}),
    "gossip": (2, {"strategy": "gossip"}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2}),
    "tp-pp": (4, {"tp": 2, "pp": 2}),
}


def measured(
    mesh: Mesh, folder: str, **settings: Any
) -> tuple[list[float], list[dict[str, float]], float | None]:
    """The losses of the steps, the metrics of the evaluations, and the best of them."""
    run = run_of(mesh, "allreduce", TASK, **STEPS | EPOCHS, output_dir=folder, **settings)
    if mesh.is_first:
        run.folder.mkdir(parents=True)
    train(run, lambda: False)
    if not mesh.is_first:
        return [], [], None
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in each.items() if k.startswith("eval/")} for each in records]
    losses = [each["train/loss"] for each in records if "train/loss" in each]
    return losses, [each for each in found if each], run.progress.best


@pytest.fixture(scope="module")
def alone(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pool.world(1, measured, str(tmp_path_factory.mktemp("alone") / "run"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_task_is_exact(pool: Pool, tmp_path: Any, alone: Any, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    losses, metrics, best = pool.world(ranks, measured, str(tmp_path / "run"), **settings)[0]
    expected_losses, expected, expected_best = alone
    assert expected_best == max(each["eval/accuracy"] for each in expected)
    assert all(each["eval/predicted"] == 17 for each in metrics)
    if layout == "gossip":  # which trains otherwise: its own predictions have to add up, as `metrics` asserts
        return
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert best == expected_best
    for found, one in zip(metrics, expected, strict=True):
        assert found.pop("eval/loss") == pytest.approx(one["eval/loss"], rel=1e-9)
        assert found == {name: value for name, value in one.items() if name != "eval/loss"}


def refused(mesh: Mesh) -> str:
    with pytest.raises(UserError) as caught:
        run_of(mesh, "allreduce", TASK, **STEPS | EPOCHS, cp=2)
    return str(caught.value)


def test_what_predicts_wants_whole_sequences(pool: Pool) -> None:
    assert "predicts of whole rows" in pool.world(2, refused)[0]
