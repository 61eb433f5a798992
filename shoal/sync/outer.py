"""Outer rules: how the shared parameters x move when the replicas, after some steps alone, hold y_i.

The outer gradient of all rules is D = x - mean_i y_i.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class Outer(ABC):
    """One rule, for one flat buffer of parameters; it owns the momentum."""

    # None: a replica continues from x; else it moves by this part of its distance back to x.
    pull: float | None = None

    def __init__(self, rate: float, momentum: float) -> None:
        self.rate = rate
        self.factor = momentum
        self.momentum: Tensor | None = None

    @abstractmethod
    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        """Move `shared` in place by the outer gradient `delta`; `learning_rate` is the inner one of this step."""

    def _momentum(self, like: Tensor) -> Tensor:
        if self.momentum is None:
            self.momentum = like.new_zeros(like.shape)
        return self.momentum


class Mean(Outer):
    """x -= D: the mean of the replicas (McMahan et al. 2017, FedAvg; Stich 2019, Local SGD)."""

    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        shared.sub_(delta)


class Nesterov(Outer):
    """m = mu m + D; x -= rate (D + mu m) (Douillard et al. 2023, DiLoCo, algorithm 1: rate 0.7, mu 0.9)."""

    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        # As torch.optim.SGD(nesterov=True) with D as its gradient.
        momentum = self._momentum(shared).mul_(self.factor).add_(delta)
        shared.sub_(delta.add(momentum, alpha=self.factor), alpha=self.rate)


class SlowMo(Outer):
    """u = beta u + D / lr; x -= alpha lr u (Wang et al. 2020, SlowMo, equations 2 and 3).

    The defaults, alpha 1 and beta 0.7, lie within the range the paper tried (from memory: 0.4 to 0.8).
    """

    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        # The inner rate that divides D is the one of the step that syncs.
        momentum = self._momentum(shared).mul_(self.factor).add_(delta, alpha=1 / learning_rate)
        shared.sub_(momentum, alpha=self.rate * learning_rate)


class BlockMomentum(Outer):
    """d = eta d - zeta D; x += d (Chen and Huo 2016, BMUF with classical block momentum).

    The default eta is 1 - 1/N for N replicas, zeta 1 (both from memory of the paper).
    """

    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        shared.add_(self._momentum(shared).mul_(self.factor).sub_(delta, alpha=self.rate))


class Elastic(Outer):
    """e_i = a (y_i - x); y_i -= e_i; x += sum_i e_i, with a = beta / N (Zhang et al. 2015, EASGD, equations 5 and 6).

    The default beta is 0.9, as in the paper (from memory). The replicas stay apart.
    """

    def __init__(self, rate: float, world_size: int) -> None:
        super().__init__(rate, 0.0)
        self.pull = rate / world_size

    def update(self, shared: Tensor, delta: Tensor, learning_rate: float) -> None:
        # The sum of all e_i is -beta D.
        shared.sub_(delta, alpha=self.rate)
