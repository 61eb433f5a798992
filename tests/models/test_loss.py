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
    tensors: list[torch.Tensor], labels: torch.Tensor, smoothing: float = 0.0
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    wide = [each.detach().double().requires_grad_() for each in tensors]
    scores = F.linear(*wide)
    total = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total, torch.autograd.grad(total * 0.25, wide)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
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
def test_equals_plain_cross_entropy(
    dtype: torch.dtype, autocast: bool, tolerance: float, bias: bool, smoothing: float
) -> None:
    tensors, labels = parts(dtype, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = tensors[1], tensors[2] if bias else None
        total = linear_cross_entropy(tensors[0], *weights, labels, smoothing=smoothing)
    grads = torch.autograd.grad(total * 0.25, tensors)

    expected, expected_grads = reference(tensors, labels, smoothing)
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


def test_float16_rounds_no_gradient_before_it_is_scaled() -> None:
    """At a label's probability of 0.999: as near to float64 as plain torch with a loss scale, whatever the labels."""
    words, tokens, width = 4096, 96, 256
    torch.manual_seed(0)
    labels = torch.randint(0, words, (tokens,))
    directions = F.normalize(torch.randn(words, width), dim=1)
    hidden = directions[labels] * width**0.5
    scores = F.linear(hidden.double(), directions.double())
    others = scores.masked_fill(F.one_hot(labels, words).bool(), -torch.inf).logsumexp(1)
    gap = scores.gather(1, labels[:, None])[:, 0] - others
    sharp = (6.9 / gap).mean().item()  # e^6.9 = 1000
    tensors = [(hidden * sharp).requires_grad_(), directions.requires_grad_()]

    def far(total: torch.Tensor) -> list[torch.Tensor]:
        """Of each row of the gradients: how far it is from float64's, as a part of that."""
        grads = torch.autograd.grad(total * 2.0**16 / tokens, tensors)
        exact = [each.detach().double().requires_grad_() for each in tensors]
        rounded = [each.half().double() for each in exact]  # the inputs of all products in float16
        loss = F.cross_entropy(F.linear(*rounded), labels, reduction="sum")
        expected = torch.autograd.grad(loss * 2.0**16 / tokens, exact)
        return [
            (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
            for ours, theirs in zip(grads, expected, strict=True)
        ]

    with torch.autocast("cpu", torch.float16):
        ours = far(linear_cross_entropy(*tensors, None, labels))
        plain = far(cross_entropy(F.linear(*tensors), labels))
    for away, reference in zip(ours, plain, strict=True):
        assert away.max() <= 1.1 * reference.max()
        assert away.max() < 0.1
