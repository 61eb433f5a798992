"""The chunked loss against plain cross entropy: the same sum, the same gradients, at every dtype."""

import pytest
import torch
from torch.nn import functional as F

from shoal.models import loss
from shoal.models.loss import IGNORED, cross_entropy, linear_cross_entropy

TOKENS, WIDTH, WORDS = 150, 16, 97


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)  # two whole chunks and a part


def parts(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(TOKENS, WIDTH), (WORDS, WIDTH)] + [(WORDS,)] * bias
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, WORDS, (TOKENS,))
    labels[::7] = IGNORED
    return tensors, labels


def reference(
    tensors: list[torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    wide = [each.detach().double().requires_grad_() for each in tensors]
    total = F.cross_entropy(F.linear(*wide), labels, ignore_index=IGNORED, reduction="sum")
    return total, torch.autograd.grad(total * 0.25, wide)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 1e-5),
        (torch.float32, True, 2e-2),
        (torch.bfloat16, False, 2e-2),
    ],
)
def test_equals_plain_cross_entropy(dtype: torch.dtype, autocast: bool, tolerance: float, bias: bool) -> None:
    tensors, labels = parts(dtype, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = linear_cross_entropy(tensors[0], tensors[1], tensors[2] if bias else None, labels)
    grads = torch.autograd.grad(total * 0.25, tensors)

    expected, expected_grads = reference(tensors, labels)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert total.item() == pytest.approx(expected.item(), rel=min(tolerance, 2e-3))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_ignored_tokens_have_no_gradient() -> None:
    tensors, labels = parts(torch.float32, False)
    linear_cross_entropy(tensors[0], tensors[1], None, labels).backward()
    silent = tensors[0].grad.abs().sum(1) == 0
    assert torch.equal(silent, labels == IGNORED)


def test_without_labels_the_sum_is_zero() -> None:
    tensors, labels = parts(torch.float32, False)
    total = linear_cross_entropy(tensors[0], tensors[1], None, torch.full_like(labels, IGNORED))
    assert total.item() == 0
    assert cross_entropy(F.linear(*tensors), torch.full_like(labels, IGNORED)).item() == 0


def test_logits_never_stand_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    one_chunk = loss._loss_and_error

    def watched(scores: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(scores))
        return one_chunk(scores, *rest)

    monkeypatch.setattr(loss, "_loss_and_error", watched)
    tensors, labels = parts(torch.float32, False)
    linear_cross_entropy(tensors[0], tensors[1], None, labels)
    assert seen == [64, 64, 22]
