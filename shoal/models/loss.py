"""Cross entropy as a sum over label tokens, taken in chunks so that logits never stand whole in memory."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.heads import Vocabulary, final_hidden, forward, head, logits, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
CHUNK_TOKENS = 512
# The gradient of a logit lies in [-1, 1], and float16 takes less than 6e-8 for zero: so it is rounded this many times
# as large, a power of two that leaves its own digits alone. As much as a loss scale gives a mean over 1 or 2 labels.
FLOAT16_SCALE = 2.0**15


def summed_cross_entropy(
    model: "PreTrainedModel",
    inputs: dict[str, Any],
    labels: Tensor,
    chunked: bool = True,
    smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy (nats) summed over labels [B, T]: a scalar in float32 (float64 for a float64 model).

    `smoothing` is the share of a label that is spread over the vocabulary (Szegedy et al. 2016, section 7).

    Labels stand where they are predicted (already shifted); -100 is ignored. `inputs` are those of
    `isolation.packed_inputs`. `chunked` needs a model with `heads.has_plain_head`.
    """
    if chunked:
        hidden, weights = final_hidden(model, inputs), head(model)
        return linear_cross_entropy(hidden, *weights, labels, vocabulary(model), smoothing)
    return cross_entropy(logits(model, inputs), labels, smoothing)


def own_loss(model: "PreTrainedModel", inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The loss of the model's own forward pass with labels [B, T], times their number: with all that it adds itself.

    So the sum of micro-batches, divided by the labels of all, weights what is added (a router's auxiliary loss) by
    labels. Labels as above; the family has to read `shift_labels`. Its logits are whole, and its loss is in float32.
    """
    count = (labels != IGNORED).sum()
    more = {"shift_labels": labels, "num_items_in_batch": count.clamp(min=1)}
    return forward(model, inputs, labels=labels, **more).loss * count


def cross_entropy(scores: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over labels [...] of the cross entropy (nats) of whole logits [..., V], in at least float32."""
    wide = scores.to(_wide(scores.dtype)).flatten(0, -2)
    labels = labels.flatten()
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cut: Vocabulary | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy(F.linear(hidden, weight, bias), labels, smoothing)` without the logits whole in memory.

    hidden [..., H], weight [V, H], bias [V] or None, labels [...]. Matrix products run in the autocast dtype
    where autocast is on, sums over tokens in at least float32. Their gradients stay in that until a loss scale has
    come to them: nothing is rounded to float16 before.

    Where the vocabulary is `cut`, weight and bias are this process's rows, of which the gradients are; the loss and
    the gradient of the hidden states are whole. Processes tell each other three numbers a token, and the latter.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, compute, cut, smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in the forward pass, while a chunk's logits are at hand: none is made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        compute: torch.dtype,
        cut: Vocabulary | None,
        smoothing: float,
    ) -> Tensor:
        assert cut is None or not smoothing, "refused by the task"
        wide = _wide(hidden.dtype)
        low_hidden, low_weight = hidden.to(compute), weight.to(compute)
        scale = FLOAT16_SCALE if compute == torch.float16 else 1.0
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden, dtype=wide)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for start in range(0, len(labels), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            scores = F.linear(low_hidden[part], low_weight)
            if bias is not None:
                scores = scores + bias
            if cut is None:
                loss, error = _loss_and_error(scores, labels[part], wide, smoothing)
            else:
                loss, error = _loss_and_error_of_part(scores, labels[part], wide, cut)
            total += loss
            if grad_bias is not None:
                grad_bias += error.sum(0)
            low_error = (error if scale == 1 else error.mul_(scale)).to(compute)
            grad_hidden[part] = _product(low_error, low_weight)
            grad_weight += _product(low_error.T, low_hidden[part])
        if scale != 1:
            grad_hidden /= scale
            grad_weight /= scale
        if cut is not None and ctx.needs_input_grad[0]:
            cut.sum(grad_hidden)
        ctx.has_bias = grad_bias is not None
        ctx.save_for_backward(grad_hidden, grad_weight, *([grad_bias] if grad_bias is not None else []))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd rounds them to the dtype that each leaf asks for.
        scaled = [saved * grad for saved in ctx.saved_tensors]
        return (*scaled, *(None,) * (4 if ctx.has_bias else 5))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; of float16, whose sums could overflow, in float32."""
    if left.dtype != torch.float16:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _loss_and_error(
    scores: Tensor, labels: Tensor, wide: torch.dtype, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Of a chunk of logits [N, V]: the summed loss, and its gradient softmax - target (ignored rows 0).

    The target has 1 - `smoothing` at the label, and `smoothing` / V everywhere.
    """
    used = labels != IGNORED
    at = labels.where(used, 0)[:, None]
    log_probability = torch.log_softmax(scores, dim=-1, dtype=wide)
    loss = -(log_probability.gather(1, at)[:, 0] * used).sum()
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * (log_probability.mean(1) * used).sum()
    error = log_probability.exp_()
    error.scatter_add_(1, at, torch.full_like(at, smoothing - 1, dtype=wide))
    if smoothing:
        error.sub_(smoothing / error.shape[1])
    return loss, error.mul_(used[:, None])


def _loss_and_error_of_part(
    scores: Tensor, labels: Tensor, wide: torch.dtype, cut: Vocabulary
) -> tuple[Tensor, Tensor]:
    """The same of the logits [N, part of V] of some rows, together with those who have the others.

    Of a token each tells its largest logit, the sum of the exponentials below it, and the label's logit if it has it
    (Shoeybi et al. 2019, section 3).
    """
    used, local = labels != IGNORED, labels - cut.first
    here = used & (local >= 0) & (local < scores.shape[1])
    at = local.where(here, 0)[:, None]
    error = scores.to(wide)
    highest, label = error.amax(-1), error.gather(1, at)[:, 0] * here
    error = error.sub_(highest[:, None]).exp_()
    tops, sums, of_label = cut.gather(torch.stack([highest, error.sum(-1), label])).unbind(1)
    top = tops.amax(0)
    total = (sums * (tops - top).exp()).sum(0)
    loss = ((top + total.log() - of_label.sum(0)) * used).sum()
    error.mul_(((highest - top).exp() / total)[:, None])
    error.scatter_add_(1, at, -here.to(wide)[:, None])
    return loss, error.mul_(used[:, None])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
