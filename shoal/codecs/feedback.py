"""Error feedback: what a codec left out is added to the next tensor."""

import torch
from torch import Tensor

from shoal.codecs.base import Codec, State


class ErrorFeedback(Codec):
    """Around any codec C, for a tensor x that is sent again and again:

        p = x + decay e; send C(p); e = p - C(p)

    so that with a decay of 1, all that was sent and the residual e add up to all that was given, whatever C leaves
    out (Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1, but for
    the learning rate, which here comes after the sum). With a smaller decay, what has waited longer counts less:
    SparseLoCo (Sarfi et al. 2025) uses 0.95 in place of an outer momentum. Costs one tensor of memory, a decoding
    and two passes; and a second tensor while the residual from before a sum is kept, so that it can be undone.

    Each rank has a residual of its own. Where the number of ranks changes, each goes on with the sum of all
    residuals divided by the new number. A number that is not finite is sent, so that all ranks see it, and dropped
    from the residual: else it would come again for ever.
    """

    biased = False

    def __init__(self, codec: Codec, decay: float = 1.0) -> None:
        super().__init__(codec._dtype)
        self.codec = codec
        self.decay = decay
        self.residual: Tensor | None = None

    def encode(self, tensor: Tensor) -> Tensor:
        pending = self.pending(tensor)
        payload = self.codec.encode(pending)
        self.sent(self.codec.decode(payload, pending.numel()))
        return payload

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        return self.codec.decode(payload, numel)

    def nbytes(self, numel: int) -> int:
        return self.codec.nbytes(numel)

    def held(self, numel: int) -> int:
        return numel * self._dtype.itemsize + self.codec.held(numel)

    def state_dict(self) -> State:
        residual = {} if self.residual is None else {"residual": self.residual}
        return residual | self.codec.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.residual = state.get("residual")
        self.codec.load_state_dict(state)

    def pending(self, tensor: Tensor) -> Tensor:
        """x + decay e: what is to be encoded. `sent` must follow, and makes the residual of it in place."""
        if self.residual is None:
            self.residual = torch.zeros_like(tensor).add_(tensor)
        elif self.decay != 1:
            self.residual = self.residual.mul(self.decay).add_(tensor)
        else:
            self.residual = self.residual.add(tensor)
        return self.residual

    def sent(self, own: Tensor) -> None:
        """Keep what `own`, the decoded payload, lacks of the pending tensor."""
        assert self.residual is not None
        self.residual.sub_(own).nan_to_num_(0.0, 0.0, 0.0)
