"""Momentum that is applied before the codec: by each rank on its own (`topk`, `randomk`), or by all (`sign`)."""

import torch
from torch import Tensor

from shoal.codecs.base import Codec, State
from shoal.codecs.feedback import ErrorFeedback


class MomentumCorrection(ErrorFeedback):
    """Deep Gradient Compression (Lin et al. 2018, sections 3.2 and 3.3, from memory but for the rule):

        u = m u + g; v = v + u; send C(v); v = v - C(v); and where something was sent, u = 0 (factor masking)

    A sparse codec delays most elements; momentum applied after it would ignore how long they have waited. The
    optimizer must have no momentum of its own then: `--optim sgd` with momentum 0. At density 1 and without
    masking it is SGD with momentum. With masking an element that was sent starts anew: stale momentum does not
    carry it past its aim.

    The paper clips each rank's gradient at N^-1/2 of the norm beforehand: that is the strategies' `clip_each`.
    Costs one tensor more than error feedback. Where the number of ranks changes, u is treated like v.
    """

    def __init__(self, codec: Codec, momentum: float, *, masking: bool = True) -> None:
        super().__init__(codec)
        self.momentum = momentum
        self.masking = masking
        self.velocity: Tensor | None = None

    def held(self, numel: int) -> int:
        return numel * self._dtype.itemsize + super().held(numel)

    def state_dict(self) -> State:
        velocity = {} if self.velocity is None else {"velocity": self.velocity}
        return velocity | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        self.velocity = state.get("velocity")
        super().load_state_dict(state)

    def pending(self, tensor: Tensor) -> Tensor:
        before = torch.zeros_like(tensor) if self.velocity is None else self.velocity
        self.velocity = before.mul(self.momentum).add_(tensor)
        return super().pending(self.velocity)

    def sent(self, own: Tensor) -> None:
        super().sent(own)
        assert self.velocity is not None
        if self.masking:
            self.velocity.masked_fill_(own != 0, 0.0)
        self.velocity.nan_to_num_(0.0, 0.0, 0.0)


class SharedMomentum:
    """1-bit Adam (Tang et al. 2021, algorithm 1). In place of g the N ranks encode and sum

        x_i = b m / N + (1 - b) g_i; m = sum_i C(x_i)        g = sum_i g_i, and m is the same on all ranks

    (The paper writes means where here the gradients of the ranks add up to the mean.) In the warm-up, while
    nothing is encoded, m follows the exact sums and the optimizer gets g; afterwards it gets m in place of g. It
    must have no momentum of its own then, and an Adam must leave its second moment as it was when the warm-up
    ended: it varies little by then, and cannot be computed from one bit. Costs one tensor of memory.
    """

    def __init__(self, factor: float, world_size: int) -> None:
        self.factor = factor
        self.world_size = world_size
        self.momentum: Tensor | None = None

    def before(self, tensor: Tensor) -> None:
        """Put x_i in the place of g_i."""
        tensor.mul_(1 - self.factor)
        if self.momentum is not None:
            tensor.add_(self.momentum, alpha=self.factor / self.world_size)

    def after(self, total: Tensor, *, encoded: bool) -> None:
        """Compute m from the sum over the ranks. A sum that is not finite leaves it: the step is skipped."""
        if not torch.isfinite(total).all():
            return
        if encoded:
            self.momentum = total.clone()
        else:
            before = torch.zeros_like(total) if self.momentum is None else self.momentum
            self.momentum = before.lerp(total, 1 - self.factor)
