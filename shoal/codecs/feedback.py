"""Error feedback: what a codec left out is added to what it is given next."""

from collections.abc import Generator

import torch
from torch import Tensor

from shoal.codecs.base import Codec, State


class ErrorFeedback(Codec):
    """Around any codec C, for a tensor x that is sent again and again:

        p = x + decay e; send C(p); e = p - C(p)

    so that with a decay of 1, all that was sent and the residual e add up to all that was given, whatever C leaves
    out (Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1, but for
    the learning rate, which here comes after the sum). With a smaller decay, what has waited longer counts less:
    SparseLoCo (Sarfi et al. 2025) takes 0.95, in the place of an outer momentum. Costs one tensor of memory, a
    decoding and two passes.

    A rank's residual is its own. Where the number of ranks changes, each goes on with the sum of the residuals
    of all, divided by the new number. What is not finite is sent and seen, and forgotten here: else it would
    come again for ever.
    """

    biased = False

    def __init__(self, codec: Codec, decay: float = 1.0) -> None:
        super().__init__(codec.dtype)
        self.codec = codec
        self.decay = decay
        self.combine = codec.combine
        self.residual: Tensor | None = None

    def encode(self, tensor: Tensor) -> Tensor:
        """C(x + decay e)."""
        pending = self._pending(tensor)
        payload = self.codec.encode(pending)
        self._sent(self.codec.decode(payload, pending.numel()))
        return payload

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """As the codec does."""
        return self.codec.decode(payload, numel)

    def nbytes(self, numel: int) -> int:
        """As the codec's."""
        return self.codec.nbytes(numel)

    def merge(self, parts: Tensor) -> Tensor:
        """As the codec does."""
        return self.codec.merge(parts)

    def add(self, payload: Tensor, total: Tensor) -> None:
        """As the codec does."""
        self.codec.add(payload, total)

    def rounds(self, tensor: Tensor) -> Generator[Tensor, None, Tensor]:
        """Sums x + decay e over the ranks, as the codec does."""
        tensor.copy_(self._pending(tensor))
        own = yield from self.codec.rounds(tensor)
        self._sent(own)
        return own

    def round_bytes(self, numel: int) -> list[int]:
        """As the codec's."""
        return self.codec.round_bytes(numel)

    def held(self, numel: int) -> int:
        """The residual, and what the codec holds."""
        return numel * self.dtype.itemsize + self.codec.held(numel)

    def state_dict(self) -> State:
        """The residual, and what the codec remembers."""
        residual = {} if self.residual is None else {"residual": self.residual}
        return residual | self.codec.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` gave."""
        self.residual = state.get("residual")
        self.codec.load_state_dict(state)

    def _pending(self, tensor: Tensor) -> Tensor:
        """x + decay e, which lies where the residual will: no third tensor is needed."""
        if self.residual is None:
            self.residual = torch.zeros_like(tensor)
        if self.decay != 1:
            self.residual.mul_(self.decay)
        return self.residual.add_(tensor)

    def _sent(self, own: Tensor) -> None:
        assert self.residual is not None
        self.residual.sub_(own).nan_to_num_(0.0, 0.0, 0.0)
