"""Products in float8: those of the formats' own rounding, in the layers that can have them, gradients included."""

from pathlib import Path

import pytest
import torch
from laws.launches import BATCH, shoal
from laws.pool import Pool
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.float8 import use_float8

CPU = torch.device("cpu")


class Two(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 48, bias=False)
        self.head = nn.Linear(48, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.inner(hidden))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest that `dtype` has, at the scale at which the largest value is its largest."""
    scale = torch.finfo(dtype).max / values.abs().max()
    return (values * scale).to(dtype).float() / scale


def test_products_are_those_of_rounded_factors() -> None:
    torch.manual_seed(0)
    model, hidden, back = Two(), torch.randn(24, 32), torch.randn(24, 48)
    names = [name for name, _ in model.named_parameters()]
    use_float8(model, CPU)
    assert [name for name, _ in model.named_parameters()] == names
    weight, taken = model.inner.weight, hidden.clone().requires_grad_()
    found = model.inner(taken)
    found.backward(back)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    wanted = rounded(hidden, e4m3) @ rounded(weight.detach(), e4m3).T
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, hidden @ weight.T, rtol=1e-3, atol=1e-3)
    assert taken.grad is not None
    assert weight.grad is not None
    assert torch.allclose(
        taken.grad, rounded(back, e5m2) @ rounded(weight.detach(), e4m3), rtol=1e-5, atol=1e-5
    )
    assert torch.allclose(weight.grad, rounded(back, e5m2).T @ rounded(hidden, e4m3), rtol=1e-5, atol=1e-5)


def test_the_head_is_left_out() -> None:
    model = Two()
    use_float8(model, CPU)
    assert type(model.head) is nn.Linear
    assert type(model.inner) is not nn.Linear


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="fp8-mixed"):
        use_float8(Two(width=20), CPU)


def test_a_run_ends_with_its_export(pool: Pool, data: list[str], tmp_path: Path) -> None:
    """Whose logits are those of whole products, and not of the model that was trained."""
    words = ["train", *data, *BATCH, "--precision", "fp8", "--max-steps", "6", "--output-dir", str(tmp_path)]
    ended = pool.alone(shoal, [*words, "--nproc-per-node", "1"])
    assert ended.code == 0, ended.output
    assert (tmp_path / "final" / "model.safetensors").exists()
