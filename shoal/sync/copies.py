"""Encoded gossip: both ends of an edge hold a copy of the sender's parameters, and what travels moves it.

CHOCO-SGD (Koloskova et al. 2019, arXiv 1902.00340, algorithm 2, from memory), each edge on its own so that the graph
may change with the steps. c_ij is the copy that i and j hold of x_i, at first the parameters all start from:

    c_ij = c_ij + C(x_i - c_ij)                    C(.) is what travels
    x_i = x_i + y (sum_j W_ij c_ji - sum_j W_ji c_ij)

As much enters as leaves, so the mean is conserved whatever the codec C leaves out. That stays in x - c and is sent
later, so error feedback is not needed. Encoding x itself would not work: its error does not shrink as the replicas
agree. The part y, `mixing`, must be the smaller the more C leaves out, or copies lag and the replicas drift apart.

Held: two copies of the parameters for each edge. In the one-peer graph a rank has log2 N edges, used in turn.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.codecs import Codec, Subject, make
from shoal.codecs.sparse import DENSITY
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed
from shoal.sync.base import State
from shoal.sync.parameters import read
from shoal.tensors.buckets import Bucket


def default_mixing(options: StrategyConfig) -> float:
    """About the y that keeps replicas closest whose updates are noise: tried on 4 and 8 ranks of each graph."""
    density = options.density or DENSITY
    of_codec = {"sign": 0.5, "powersgd": 0.1, "topk": min(1.0, 3 * density), "randomk": density / 2}
    return of_codec.get(options.codec, 1.0)


def payload_bytes(options: StrategyConfig, subject: Subject) -> int:
    """The bytes sent over an edge for parameters of these shapes."""
    return make(options, subject).nbytes(subject.numel)


class Copies:
    """Copies of each bucket: of this replica as each receiver holds it, and of each sender as this rank holds it."""

    def __init__(
        self,
        options: StrategyConfig,
        buckets: Sequence[Bucket],
        senders: Iterable[int],
        receivers: Iterable[int],
    ) -> None:
        self.buckets = buckets
        subjects = [
            Subject(tuple(bucket.shapes), bucket.flat.dtype, derive_seed(0, "gossip", i))
            for i, bucket in enumerate(buckets)
        ]
        self.sizes = [subject.numel for subject in subjects]  # without padding
        self.decoders = [make(options, subject) for subject in subjects]
        self.encoders: dict[int, list[Codec]] = {r: [make(options, s) for s in subjects] for r in receivers}
        self.of_own: dict[int, list[Tensor]] = {receiver: self._parameters() for receiver in self.encoders}
        self.of_other: dict[int, list[Tensor]] = {sender: self._parameters() for sender in senders}

    def encode(self, receiver: int, own: Sequence[Tensor]) -> list[Tensor]:
        """What to send to `receiver` of the buckets `own`: uint8 each."""
        sent = []
        edge = zip(self.encoders[receiver], self.of_own[receiver], self.sizes, own, strict=True)
        for codec, copy, numel, x in edge:
            known = copy[:numel]
            sent.append(codec.encode(x[:numel] - known))
            known.add_(codec.decode(sent[-1], numel))
        return sent

    def room(self) -> list[Tensor]:
        """Buffers for what a sender sends of each bucket."""
        sizes = [codec.nbytes(numel) for codec, numel in zip(self.decoders, self.sizes, strict=True)]
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def receive(self, sender: int, payloads: Sequence[Tensor]) -> list[Tensor]:
        """The copy of each bucket of `sender`, updated by the `payloads` that it has sent."""
        copies = self.of_other[sender]
        for codec, copy, numel, payload in zip(self.decoders, copies, self.sizes, payloads, strict=False):
            copy[:numel].add_(codec.decode(payload, numel))
        return copies

    def state_dict(self) -> State:
        """All copies, and the encoders' state."""
        state: State = {}
        for way, held in (("own", self.of_own), ("other", self.of_other)):
            state |= {
                f"copy/{way}/{r}/{i}": copy for r, copies in held.items() for i, copy in enumerate(copies)
            }
        for receiver, codecs in self.encoders.items():
            for i, codec in enumerate(codecs):
                state |= {f"codec/{receiver}/{i}/{part}": t for part, t in codec.state_dict().items()}
        return state

    def load_state_dict(self, state: State | None) -> None:
        """Load what `state_dict` returned. None: all replicas hold the same parameters, and start from them."""
        for way, held in (("own", self.of_own), ("other", self.of_other)):
            for rank, copies in held.items():
                for i, (copy, fresh) in enumerate(zip(copies, self._parameters(), strict=True)):
                    copy.copy_(fresh if state is None else state[f"copy/{way}/{rank}/{i}"])
        for receiver, codecs in self.encoders.items():
            for i, codec in enumerate(codecs):
                prefix = f"codec/{receiver}/{i}/"
                codec.load_state_dict(
                    {n.removeprefix(prefix): t for n, t in (state or {}).items() if n.startswith(prefix)}
                )

    def _parameters(self) -> list[Tensor]:
        return [read(bucket).cpu() for bucket in self.buckets]
