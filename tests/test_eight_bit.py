"""Eight-bit state: blocks that a cut does not break, torchao's own update, and the same bits after a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws.layouts import LAYOUTS, follow_in_pieces, together
from laws.pool import Pool
from laws.rows import VOCABULARY, RowsTask
from laws.worlds import first_difference, follow
from torch import Tensor, nn
from torchao.optim import AdamW8bit as Theirs

from shoal import checkpoint
from shoal.config import load_config
from shoal.config.options import check_options
from shoal.errors import UserError
from shoal.layouts.base import whole_model
from shoal.optim.eight_bit import AdamW8bit, block_size
from shoal.optim.optimizers import Hyperparameters, NamedState, build


class WideNet(nn.Module):
    """Matrices that are large enough for codes: blocks of 256 and of 32, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        self.layers = nn.ModuleList([nn.Linear(256, 96), nn.Linear(96, 256)])
        self.odd = nn.Linear(256, 7)
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.layers[1](self.layers[0](hidden).relu())
        return self.head(hidden + self.odd(hidden).sum(-1, keepdim=True))


class WideTask(RowsTask):
    """The rows of the laws, learnt by a wider net."""

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return WideNet()


STEPS = {
    "optim": "adamw-8bit", "precision": "32-true", "max_steps": 6, "global_batch_size": 12,
    "per_device_train_batch_size": 2, "learning_rate": 0.01, "balance": "off",
}  # fmt: skip


def draw_gradients(params: list[tuple[str, nn.Parameter]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _, p in params:
        p.grad = torch.randn(p.shape, generator=draw)


def test_the_update_is_that_of_torchao() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(p.clone()) for p in [torch.randn(64, 256)] * 2)
    (mine,) = build("adamw-8bit", [("w", ours)], Hyperparameters(0.05, 0.1))
    other = Theirs([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(5):
        draw_gradients([("w", ours), ("w", theirs)][:1], seed)
        assert ours.grad is not None
        theirs.grad = ours.grad.clone()
        mine.step()
        with torch.compiler.set_stance("force_eager"):
            other.step()
    assert torch.equal(ours, theirs)
    held = sum(t.nbytes for _, t in NamedState([mine], [("w", ours)]).tensors())
    assert held == 2 * (ours.numel() + ours.numel() // 256 * 4) + 4


@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 256), 256), ((4096,), 0), ((3, 256), 256), ((512, 344), 0), ((100, 96), 32), ((8, 8, 128), 128)],
)
def test_blocks_lie_along_the_last_dim(shape: tuple[int, ...], block: int) -> None:
    assert block_size(torch.Size(shape)) == block


def test_state_goes_in_and_out_of_codes() -> None:
    """To the bit as codes; into other blocks within a step of the code, 2 % of a block's largest; and to AdamW."""
    torch.manual_seed(1)
    first = [("w", nn.Parameter(torch.randn(64, 256))), ("b", nn.Parameter(torch.randn(9)))]
    (one,) = build("adamw-8bit", first, Hyperparameters(0.05, 0.1))
    for seed in range(3):
        draw_gradients(first, seed)
        one.step()
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in NamedState([one], first).tensors():
        name, part = key.rsplit("/", 1)
        kept.setdefault(name, {})[part] = tensor.clone()
    assert {t.dtype for parts in kept.values() for t in parts.values()} == {torch.uint8, torch.float32}

    second = [(name, nn.Parameter(p.detach().clone())) for name, p in first]
    (two,) = build("adamw-8bit", second, Hyperparameters(0.05, 0.1))
    (plain,) = build("adamw", second, Hyperparameters(0.05, 0.1))
    NamedState([two], second).load(lambda name: kept[name])
    NamedState([plain], second).load(lambda name: kept[name])
    widened = plain.state[second[0][1]]["exp_avg"]
    assert torch.equal(widened, one.state[first[0][1]]["exp_avg"].dequantize())
    part = {"step": kept["w"]["step"]}  # as a piece of 96 columns reads it, whose blocks are of 32
    for moment in ("exp_avg", "exp_avg_sq"):
        part[f"{moment}.codes"] = kept["w"][f"{moment}.codes"][:, 100:196]
        part[f"{moment}.scale"] = kept["w"][f"{moment}.scale"].repeat_interleave(256, -1)[:, 100:196]
    assert isinstance(two, AdamW8bit)
    narrow = nn.Parameter(torch.zeros(64, 96))
    two.adopt(narrow, part)
    found, exact = two.state[narrow]["exp_avg"].dequantize(), widened[:, 100:196]
    assert ((found - exact).abs() <= 0.02 * exact.abs().max()).all()
    del two.state[narrow]
    for seed in range(3, 6):
        draw_gradients(first, seed)
        draw_gradients(second, seed)
        one.step()
        two.step()
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["replicated", "local", "zero3-of-3", "hybrid"])
def test_interrupted_equals_uninterrupted(pool: Pool, tmp_path: Path, layout: str) -> None:
    """Law 7, to the bit; between replicas that differ, too."""
    ranks, island, settings = LAYOUTS.get(layout, (2, 1, {}))
    strategy = "local" if layout == "local" else "allreduce"
    common = STEPS | settings
    wholes = pool.world(
        ranks, follow_in_pieces, strategy, WideTask(), output_dir=str(tmp_path / "w"), **common
    )
    broken = common | {"output_dir": str(tmp_path / "b")}
    pool.world(ranks, follow, strategy, WideTask(), stop_after=3, **broken)
    again = pool.world(
        ranks, follow_in_pieces, strategy, WideTask(), resume_from_checkpoint="latest", **broken
    )
    for first in range(0, ranks, island):
        for (_, held, _), (_, after, _) in zip(wholes[first:][:island], again[first:][:island], strict=True):
            one, other = (
                [{n: t for n, (_, _, t) in step.items()} for step in each] for each in (held, after)
            )
            assert first_difference(one[3:], other) is None


def test_saved_under_one_and_loaded_under_another(pool: Pool, tmp_path: Path) -> None:
    """Law 8. Blocks are the same under any cut of rows: codes stay, but sums of gradients are rounded otherwise."""
    (whole,) = pool.world(1, follow, "allreduce", WideTask(), output_dir=str(tmp_path / "whole"), **STEPS)
    for saver, loader in (("zero3", "alone"), ("alone", "zero3-of-3"), ("zero3", "hybrid")):
        layouts: dict[str, tuple[int, int, dict[str, Any]]] = {"alone": (1, 1, {}), **LAYOUTS}
        ranks, _, settings = layouts[saver]
        folder = str(tmp_path / f"{saver}-{loader}")
        pool.world(
            ranks, follow, "allreduce", WideTask(), output_dir=folder, stop_after=3, **STEPS, **settings
        )
        ranks, island, settings = layouts[loader]
        resumed = {"output_dir": folder, "resume_from_checkpoint": "latest", **STEPS, **settings}
        on_rank = pool.world(ranks, follow_in_pieces, "allreduce", WideTask(), **resumed)
        found = together([held[-1] for _, held, _ in on_rank[:island]])
        # A sum in another order may turn a code: by a step of it, of what is itself a step of the rate.
        assert first_difference([whole.tensors[-1]], [found], 0.02) is None
        assert np.isclose(on_rank[0][0][-1], whole.losses[-1], rtol=1e-3)


DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no scale": lambda held: held.pop("weight/exp_avg.scale"),
    "no number": lambda held: held.update({"weight/exp_avg.scale": torch.zeros(64, 0)}),
    "too few rows": lambda held: held.update({"weight/exp_avg.scale": torch.zeros(63, 1)}),
    "does not divide": lambda held: held.update({"weight/exp_avg.scale": torch.zeros(64, 3)}),
    "no bytes": lambda held: held.update({"weight/exp_avg.codes": torch.zeros(64, 256)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_codes_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    model = nn.Linear(256, 64)
    params = list(model.named_parameters())
    (optimizer,) = build("adamw-8bit", params, Hyperparameters(0.05, 0.1))
    draw_gradients(params, 0)
    optimizer.step()
    state, folder = NamedState([optimizer], params), tmp_path / "checkpoint-1"
    held = dict(state.tensors())
    DAMAGES[damage](held)
    checkpoint.write(folder, {"optimizer/state.safetensors": held}, checkpoint.Progress(step=1), None)
    with pytest.raises(UserError, match="do not fit"):
        checkpoint.load_optimizer(folder, state, whole_model(model, lambda *_: torch.zeros(())))


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_torch_8bit", "adamw_bnb_8bit"])
def test_the_names_of_others(name: str) -> None:
    assert load_config(None, ["--optim", name], {}).config.train.optim == "adamw-8bit"


@pytest.mark.parametrize(
    "words", [["--precision", "64-true"], ["--strategy", "local", "--guard", "0.1"], ["--strategy", "server"]]
)
def test_what_codes_cannot_be_had_with_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        check_options(load_config(None, ["--optim", "adamw-8bit", *words], {}))
