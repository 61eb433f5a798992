"""How a tensor is summed over the ranks with a codec: four ways, each a generator of the exchanges it starts.

The kind of the codec decides which one. For n elements of b bytes, N ranks and c = ceil(n / N) a rank sends:

- dense: an all-reduce of the tensor, not encoded                                   2 (N - 1) / N b n
- chunks: chunk r, encoded, goes to rank r, which decodes and adds up what all have
  sent, encodes the sum, and sends it to all: two encodings, however many ranks     2 (N - 1) nbytes(c)
- gather: the encoded tensor of each rank goes to all                               (N - 1) nbytes(n)
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
from shoal.codecs.base import ChunkCodec, Codec, GatherCodec, LinearCodec, State, Subject
from shoal.codecs.feedback import ErrorFeedback
from shoal.codecs.momentum import SharedMomentum
from shoal.codecs.sparse import Sparse
from shoal.config import StrategyConfig
from shoal.data.order import derive_seed
from shoal.wire.wire import Exchange, Wire


class Reduction:
    """How tensors of `numel` elements are summed: here not encoded. The other ways override what differs."""

    rounds = 1  # exchanges one after the other

    def __init__(self, codec: Codec, feeding: Codec, numel: int) -> None:
        self.codec = codec
        self.feeding = feeding  # `codec` with error feedback, where there is one
        self.numel = numel

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        """Sum `tensor` [numel] in place: yields the exchanges as it starts them, and goes on when they are done."""
        yield wire.start_all_reduce(tensor)

    def bytes_sent(self, world_size: int) -> int:
        """What a rank sends for the next sum: see the head of this file."""
        return 2 * (self.codec.nbytes(self.numel) * (world_size - 1) // world_size)

    def held(self) -> int:
        """Bytes of state between two sums."""
        return self.feeding.held(self.numel)

    def state_dict(self) -> State:
        """The codec's state, by part."""
        return self.feeding.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Load what `state_dict` returned."""
        self.feeding.load_state_dict(state)


class ChunkReduction(Reduction):
    """Each rank sums one chunk, and encodes its sum with a codec of its own."""

    rounds = 2

    def __init__(self, codec: ChunkCodec, options: StrategyConfig, subject: Subject, world_size: int) -> None:
        super().__init__(codec, fed_back(EncodedRows(codec, world_size), options), subject.numel)
        self.merge = codec.merge
        self.chunk = -(-self.numel // world_size)
        of_sums = replace(subject, seed=derive_seed(subject.seed, "server"))
        self.server = fed_back(make(options, of_sums), options)

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        sent = self.feeding.encode(tensor)
        received = torch.empty_like(sent)
        yield wire.start_exchange(received, [self.codec.nbytes(self.chunk)] * wire.world_size, sent)
        parts = self.codec.decode(received.view(wire.world_size, -1), self.chunk)
        total = self.merge(parts)
        total[max(0, self.numel - wire.rank * self.chunk) :] = 0  # beyond the end, where a sign is not 0
        part = self.server.encode(total)
        whole = part.new_empty(wire.world_size * part.numel())
        yield wire.start_all_gather(whole, part)
        tensor.copy_(self.feeding.decode(whole, self.numel))

    def bytes_sent(self, world_size: int) -> int:
        return 2 * (world_size - 1) * self.codec.nbytes(self.chunk)

    def held(self) -> int:
        return super().held() + self.server.held(self.chunk)

    def state_dict(self) -> State:
        server = {f"server.{part}": tensor for part, tensor in self.server.state_dict().items()}
        return super().state_dict() | server

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        server = {n.removeprefix("server."): t for n, t in state.items() if n.startswith("server.")}
        self.server.load_state_dict(server)


class GatherReduction(Reduction):
    """Each rank decodes what all have sent."""

    def __init__(self, codec: GatherCodec, options: StrategyConfig, numel: int) -> None:
        super().__init__(codec, fed_back(codec, options), numel)
        self.add = codec.add

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        part = self.feeding.encode(tensor)
        whole = part.new_empty(wire.world_size * part.numel())
        yield wire.start_all_gather(whole, part)
        tensor.zero_()
        for payload in whole.view(wire.world_size, -1):
            self.add(payload, tensor)

    def bytes_sent(self, world_size: int) -> int:
        return (world_size - 1) * self.codec.nbytes(self.numel)


class LinearReduction(Reduction):
    """What is encoded is summed by all-reduce."""

    def __init__(self, codec: LinearCodec, options: StrategyConfig, numel: int) -> None:
        super().__init__(codec, fed_back(codec, options), numel)
        self.linear = codec

    @property
    def rounds(self) -> int:  # type: ignore[override]
        """Exchanges one after the other."""
        return len(self.linear.round_bytes(self.numel))

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        feedback = self.feeding if isinstance(self.feeding, ErrorFeedback) else None
        for part in self._fed_back(tensor, feedback) if feedback else self.linear.rounds(tensor):
            yield wire.start_all_reduce(part)

    def _fed_back(self, tensor: Tensor, feedback: ErrorFeedback) -> Iterator[Tensor]:
        tensor.copy_(feedback.pending(tensor))
        own = yield from self.linear.rounds(tensor)
        feedback.sent(own)

    def bytes_sent(self, world_size: int) -> int:
        others = world_size - 1
        return sum(2 * (nbytes * others // world_size) for nbytes in self.linear.round_bytes(self.numel))


def _reduction(options: StrategyConfig, subject: Subject, world_size: int) -> Reduction:
    codec = make(options, subject)
    if isinstance(codec, ChunkCodec):
        return ChunkReduction(codec, options, subject, world_size)
    if isinstance(codec, GatherCodec):
        return GatherReduction(codec, options, subject.numel)
    if isinstance(codec, LinearCodec):
        return LinearReduction(codec, options, subject.numel)
    return Reduction(codec, codec, subject.numel)


class Channel:
    """The sums of one tensor, and their state: that of the codecs, of the momentum, and the length of the warm-up."""

    def __init__(self, options: StrategyConfig, subject: Subject, world_size: int) -> None:
        self.subject = subject
        self.reduction = _reduction(options, subject, world_size)
        factor = options.codec_momentum if isinstance(self.reduction, ChunkReduction) else 0.0
        self.momentum = SharedMomentum(factor, world_size) if factor else None
        self.warmup = 0 if isinstance(self.reduction.codec, Sparse) else options.codec_warmup
        self.sums = 0
        self.encoded = False  # the last sum

    def sum(self, tensor: Tensor, wire: Wire) -> Iterator[Exchange]:
        """Sum `tensor` in place: yields the exchanges as it starts them, and goes on when they are done."""
        encoded = self.encoded = self.sums >= self.warmup and type(self.reduction) is not Reduction
        self.sums += 1
        flat = tensor[: self.subject.numel]
        if self.momentum and encoded:
            self.momentum.before(flat)
        if encoded:
            yield from self.reduction.sum(flat, wire)
        else:  # with its padding
            yield wire.start_all_reduce(tensor)
        if self.momentum:
            self.momentum.after(flat, encoded=encoded)

    @property
    def rounds(self) -> int:
        """How many exchanges the last sum took, one after the other."""
        return self.reduction.rounds if self.encoded else 1

    def bytes_sent(self, world_size: int) -> int:
        """What a rank sends for the next sum, if that is encoded: see the head of this file."""
        return self.reduction.bytes_sent(world_size)

    def held(self) -> int:
        """Bytes of state between two sums."""
        momentum = self.subject.numel * self.subject.dtype.itemsize if self.momentum else 0
        return self.reduction.held() + momentum

    def state_dict(self) -> State:
        """The state, by part."""
        state = self.reduction.state_dict()
        if self.warmup:
            state["sums"] = torch.tensor(self.sums)
        if self.momentum and self.momentum.momentum is not None:
            state["momentum"] = self.momentum.momentum
        return state

    def load_state_dict(self, state: State) -> None:
        """Load what `state_dict` returned."""
        self.sums = int(state.get("sums", 0))
        self.reduction.load_state_dict(state)
        if self.momentum:
            self.momentum.momentum = state.get("momentum")


class EncodedRows(Codec):
    """A codec of chunks on a whole tensor, which it encodes as `count` rows, the last ones filled up with zeros."""

    def __init__(self, codec: Codec, count: int) -> None:
        super().__init__(codec._dtype)
        self.codec = codec
        self.count = count
        self.biased = codec.biased

    def encode(self, tensor: Tensor) -> Tensor:
        chunk = -(-tensor.numel() // self.count)
        short = self.count * chunk - tensor.numel()
        whole = torch.cat([tensor, tensor.new_zeros(short)]) if short else tensor
        return self.codec.encode(whole.view(self.count, chunk)).view(-1)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        return self.codec.decode(payload.view(self.count, -1), -(-numel // self.count)).reshape(-1)[:numel]

    def nbytes(self, numel: int) -> int:
        return self.count * self.codec.nbytes(-(-numel // self.count))

    def state_dict(self) -> State:
        return self.codec.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.codec.load_state_dict(state)
