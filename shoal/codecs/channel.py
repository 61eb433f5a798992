"""How a tensor is summed over the ranks with a codec: four ways, each a generator of the exchanges it starts.

Which one follows from the codec's `combine`. For n elements of b bytes, N ranks and c = ceil(n / N) a rank
sends:

- dense: an all-reduce of the tensor as it is                                       2 (N - 1) / N b n
- chunks: chunk r, encoded, goes to rank r, which decodes and adds up what all have
  sent, encodes the sum, and sends it to all: two encodings, however many ranks     2 (N - 1) nbytes(c)
- gather: all that was encoded goes to all                                          (N - 1) nbytes(n)
- linear: an all-reduce of what was encoded, in each of the codec's rounds          2 (N - 1) / N of its bytes

All ranks decode the same bytes in the same order, and so end in the same bits. Errors are fed back on both
sides: where a rank encodes its tensor, and where it encodes the sum of a chunk (as in 1-bit Adam, Tang et al.
2021).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shoal.codecs import fed_back, make
from shoal.codecs.base import Codec, State, Subject
from shoal.codecs.momentum import SharedMomentum
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed
from shoal.wire.wire import Exchange, Wire


class Channel:
    """The sums of one tensor: its codecs, and what they remember."""

    def __init__(self, options: StrategyConfig, subject: Subject, world_size: int) -> None:
        self.subject = subject
        self.numel = subject.numel
        self.codec = make(options, subject)
        chunks = self.codec.combine == "chunks"
        self.chunk = -(-self.numel // world_size) if chunks else 0
        self.own = fed_back(Rows(self.codec, world_size) if chunks else self.codec, options)
        server = replace(subject, seed=derive_seed(subject.seed, "server"))
        self.server = fed_back(make(options, server), options) if chunks else None
        factor = options.codec_momentum if chunks else 0.0
        self.momentum = SharedMomentum(factor, world_size) if factor else None
        self.warmup = 0 if self.codec.ramps else options.codec_warmup
        self.sums = 0
        self.encoded = False  # the last sum

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        """Sum `tensor` in place: yields the exchanges as it starts them, and goes on when they are done."""
        encoded = self.encoded = self.sums >= self.warmup and self.codec.combine != "dense"
        self.sums += 1
        flat = tensor[: self.numel]
        if self.momentum and encoded:
            self.momentum.before(flat)
        if encoded:
            ways = {"chunks": self._chunks, "gather": self._gather, "linear": self._linear}
            yield from ways[self.codec.combine](flat, wire)
        else:
            yield wire.start_all_reduce(tensor)
        if self.momentum:
            self.momentum.after(flat, encoded=encoded)

    @property
    def rounds(self) -> int:
        """How many exchanges the last sum took, one after the other."""
        if not self.encoded or self.codec.combine == "gather":
            return 1
        return 2 if self.codec.combine == "chunks" else len(self.codec.round_bytes(self.numel))

    def bytes_sent(self, world_size: int) -> int:
        """What a rank sends for the next sum, if that is encoded: see the head of this file."""
        others = world_size - 1
        if self.codec.combine == "chunks":
            return 2 * others * self.codec.nbytes(self.chunk)
        if self.codec.combine == "gather":
            return others * self.codec.nbytes(self.numel)
        dense = self.codec.combine == "dense"
        rounds = [self.codec.nbytes(self.numel)] if dense else self.codec.round_bytes(self.numel)
        return sum(2 * (nbytes * others // world_size) for nbytes in rounds)

    def held(self) -> int:
        """Bytes remembered between two sums."""
        momentum = self.numel * self.subject.dtype.itemsize if self.momentum else 0
        server = self.server.held(self.chunk) if self.server else 0
        return self.own.held(self.numel) + server + momentum

    def state_dict(self) -> State:
        """What is remembered, by part."""
        state = self.own.state_dict()
        if self.warmup:
            state["sums"] = torch.tensor(self.sums)
        if self.server:
            state |= {f"server.{part}": tensor for part, tensor in self.server.state_dict().items()}
        if self.momentum and self.momentum.momentum is not None:
            state["momentum"] = self.momentum.momentum
        return state

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` gave."""
        self.sums = int(state.get("sums", 0))
        self.own.load_state_dict(state)
        if self.server:
            server = {n.removeprefix("server."): t for n, t in state.items() if n.startswith("server.")}
            self.server.load_state_dict(server)
        if self.momentum:
            self.momentum.momentum = state.get("momentum")

    def _chunks(self, flat: Tensor, wire: Wire) -> Iterator[Exchange]:
        assert self.server is not None
        sent = self.own.encode(flat)
        received = torch.empty_like(sent)
        yield wire.start_exchange(received, [self.codec.nbytes(self.chunk)] * wire.world_size, sent)
        parts = self.codec.decode(received.view(wire.world_size, -1), self.chunk)
        total = self.codec.merge(parts)
        total[max(0, self.numel - wire.rank * self.chunk) :] = 0  # beyond the end, where a sign is not 0
        part = self.server.encode(total)
        whole = part.new_empty(wire.world_size * part.numel())
        yield wire.start_all_gather(whole, part)
        flat.copy_(self.own.decode(whole, self.numel))

    def _gather(self, flat: Tensor, wire: Wire) -> Iterator[Exchange]:
        part = self.own.encode(flat)
        whole = part.new_empty(wire.world_size * part.numel())
        yield wire.start_all_gather(whole, part)
        flat.zero_()
        for payload in whole.view(wire.world_size, -1):
            self.codec.add(payload, flat)

    def _linear(self, flat: Tensor, wire: Wire) -> Iterator[Exchange]:
        for part in self.own.rounds(flat):
            yield wire.start_all_reduce(part)


class Rows(Codec):
    """A codec of chunks on a whole tensor, which it encodes as `count` rows, the last ones filled up with zeros."""

    combine = "chunks"

    def __init__(self, codec: Codec, count: int) -> None:
        super().__init__(codec.dtype)
        self.codec = codec
        self.count = count
        self.biased = codec.biased

    def encode(self, tensor: Tensor) -> Tensor:
        """Float [n] to uint8 [count * nbytes(ceil(n / count))]."""
        chunk = -(-tensor.numel() // self.count)
        short = self.count * chunk - tensor.numel()
        whole = torch.cat([tensor, tensor.new_zeros(short)]) if short else tensor
        return self.codec.encode(whole.view(self.count, chunk)).view(-1)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """The rows one after the other, without what fills them up."""
        return self.codec.decode(payload.view(self.count, -1), -(-numel // self.count)).reshape(-1)[:numel]

    def nbytes(self, numel: int) -> int:
        """Of all rows."""
        return self.count * self.codec.nbytes(-(-numel // self.count))

    def state_dict(self) -> State:
        """The codec's."""
        return self.codec.state_dict()

    def load_state_dict(self, state: State) -> None:
        """The codec's."""
        self.codec.load_state_dict(state)
