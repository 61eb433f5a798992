"""How a synchronous server merges the gradients of several workers into one.

All weigh a worker by its labels. Gradients [n] are parts of the gradient of the step, as `Push` defines them. Costs:
the mean is one pass; the robust ones sort, in slices, so that they need little memory beside the gradients.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shoal.servers.core import Push

Merge = Callable[[list[Push], Tensor], None]  # (pushes, where the merged gradient [n] goes)

SLICE = 1 << 18  # elements sorted at once


def mean(pushes: list[Push], out: Tensor) -> None:
    """The gradient over the labels of these pushes: of all workers it is the gradient of the whole step."""
    gradients = [push.gradient for push in pushes if push.gradient is not None]
    out.zero_()
    for gradient in gradients:  # in the order of the workers, whatever the order of arrival
        out.add_(gradient)
    labels = sum(push.labels for push in pushes)
    if labels and labels != pushes[0].step_labels:
        out.mul_(pushes[0].step_labels / labels)


def median(pushes: list[Push], out: Tensor) -> None:
    """Of each element the median over the workers, the lower and upper one averaged (Yin et al. 2018, definition 1).

    By labels: half of them lie below it, half above. With equal labels it is the median of the paper.
    """
    for values, labels, part in _sorted(pushes, out):
        reached = 2 * labels.cumsum(0)
        total = labels.sum(0)
        lower = (reached < total).sum(0, keepdim=True)
        upper = (reached <= total).sum(0, keepdim=True).clamp_(max=len(values) - 1)
        part.copy_((values.gather(0, lower) + values.gather(0, upper)).squeeze(0) / 2)


def trimmed_mean(trim: float) -> Merge:
    """Of each element the mean without the `trim` smallest and largest workers (Yin et al. 2018, definition 2).

    `trim`, below a half, is the share of the workers left out at each end, and at least one as long as one remains.
    """

    def merge(pushes: list[Push], out: Tensor) -> None:
        for values, labels, part in _sorted(pushes, out):
            count = len(values)
            left_out = min(max(1, int(trim * count)), (count - 1) // 2)
            kept = slice(left_out, count - left_out)
            weights = labels[kept].to(values.dtype)
            part.copy_((values[kept] * weights).sum(0) / weights.sum(0))

    return merge


def _sorted(pushes: list[Push], out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slice by slice: the gradients per label sorted over the workers [w, k], their labels, the slice of `out`."""
    given = [(push.gradient, push) for push in pushes if push.gradient is not None and push.labels]
    if not given:
        out.zero_()
        return
    labels = torch.tensor([push.labels for _, push in given])
    for first in range(0, out.numel(), SLICE):
        part = slice(first, min(first + SLICE, out.numel()))
        values, order = torch.stack([g[part] / push.share for g, push in given]).sort(dim=0)
        yield values, labels[order], out[part]
