"""The sums of a strategy over the ranks, encoded, and started while others are still being computed.

A sum changes the state of its codec: what was left out is added to the next tensor. So that a step can be taken
again after an exchange has failed, the state from before is kept until `commit`, and `rollback` restores it. That
costs a reference only, since codecs replace the tensors of their state.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from shoal.codecs import build, make
from shoal.codecs.base import Codec, State, Subject
from shoal.codecs.channel import Channel
from shoal.config import StrategyConfig
from shoal.cost import Sizes
from shoal.data.order import derive_seed
from shoal.wire.wire import Exchange, Wire

Shapes = Sequence[torch.Size]


class EncodedSum:
    """A sum under way: `advance` ends one exchange and starts the next, `wait` ends them all."""

    def __init__(self, exchanges: Iterator[Exchange]) -> None:
        self._exchanges = exchanges
        self._exchange = next(exchanges, None)

    def advance(self) -> "EncodedSum":
        """Wait for the exchange that was started, and start the one that needs it."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = next(self._exchanges, None)
        return self

    def wait(self) -> None:
        """Wait until the tensor is the sum."""
        while self._exchange is not None:
            self.advance()


Advance = Callable[[], EncodedSum]


class EncodedSums:
    """The sums of one strategy. Each tensor has a key, under which its codecs keep their state between two sums."""

    def __init__(self, options: StrategyConfig, wire: Wire, seed: int = 0) -> None:
        self.options = options
        self.wire = wire
        self.seed = seed
        self._channels: dict[str, Channel] = {}
        self._encoders: dict[str, Codec] = {}
        self._before: dict[str, State] = {}  # the state of each key from before what is not committed
        self._loaded: State = {}  # of keys that were not used yet

    def start_sum(self, key: str, tensor: Tensor, shapes: Shapes | None = None) -> Advance:
        """Begin to sum `tensor` [n] over the ranks in place. Call what it returns, then `.wait()` on that.

        The call waits for the first exchange and starts the second: start all tensors, call all, then wait for
        all, then `commit`. `shapes` are those of the parameters in the tensor, one after the other; padding after
        them is left unchanged where the tensor is encoded. All ranks must start the same keys in the same order.
        """
        if key not in self._channels:
            channel = Channel(self.options, self._subject(key, tensor, shapes), self.wire.world_size)
            self._channels[key] = channel
            channel.load_state_dict(self._take(key, tensor.device))
        channel = self._channels[key]
        self._before.setdefault(key, channel.state_dict())
        return EncodedSum(channel.sum(tensor, self.wire)).advance

    def commit(self, *keys: str) -> None:
        """Keep what the sums and encodings of `keys` changed, those of all keys if none is given."""
        for key in keys or tuple(self._before):
            self._before.pop(key, None)

    def rollback(self, *keys: str) -> None:
        """Undo what the sums and encodings of `keys`, by default of all, changed since the last commit."""
        for key in keys or tuple(self._before):
            if key in self._before:
                live = self._channels.get(key) or self._encoders[key]
                live.load_state_dict(self._before.pop(key))

    def rounds(self, key: str) -> int:
        """How many exchanges the last sum of `key` takes, each of which needs the one before."""
        return self._channels[key].rounds

    @property
    def encodes(self) -> bool:
        """Whether the last sums were encoded: their warm-up is over."""
        return any(channel.encoded for channel in self._channels.values())

    def encode_for(self, key: str, tensor: Tensor, shapes: Shapes | None = None) -> Tensor:
        """Encode `tensor` [n] for another rank: uint8 of the length that `payload_bytes` returns.

        What is left out is added to the next tensor of this key. There is no warm-up: a receiver must know the
        length.
        """
        if key not in self._encoders:
            self._encoders[key] = build(warm(self.options), self._subject(key, tensor, shapes))
            self._encoders[key].load_state_dict(self._take(key, tensor.device))
        self._before.setdefault(key, self._encoders[key].state_dict())
        return self._encoders[key].encode(tensor)

    def decode(self, key: str, payload: Tensor, like: Tensor, shapes: Shapes | None = None) -> Tensor:
        """Decode what another rank's `encode_for` made under this key and with these shapes: a tensor as `like`."""
        return make(warm(self.options), self._subject(key, like, shapes)).decode(payload, like.numel())

    def payload_bytes(self, like: Tensor, shapes: Shapes | None = None) -> int:
        """The length of what `encode_for` makes of a tensor as `like`."""
        return make(warm(self.options), self._subject("", like, shapes)).nbytes(like.numel())

    def state_dict(self) -> State:
        """The state of every key: "codec/KEY/part"."""
        live: dict[str, Codec | Channel] = {**self._encoders, **self._channels}
        parts = {key: each.state_dict() for key, each in live.items()}
        named = {f"codec/{key}/{part}": t for key, state in parts.items() for part, t in state.items()}
        return self._loaded | named

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Load what `state_dict` returned on every rank that saved, in their order; other names are ignored.

        For another number of ranks, residuals and velocities are added up and divided by the new number, those
        of the chunks are cut anew: what was not sent yet still will be. The rest was alike on all ranks, and that
        of rank 0 is loaded.
        """
        stateless = self.options.codec == "none"  # a search would read every tensor
        self._loaded = {} if stateless else refit(states, self.wire.rank, self.wire.world_size)
        self._channels.clear()
        self._encoders.clear()
        self._before.clear()

    @staticmethod
    def bytes_sent(options: StrategyConfig, sizes: Sizes) -> int:
        """What a rank sends for one sum of all parameters as one tensor, after the warm-up.

        Cut into buckets it is this but for what is rounded up in each: a scale, an element, a share.
        """
        return _priced(options, sizes).bytes_sent(sizes.world_size)

    @staticmethod
    def bytes_held(options: StrategyConfig, sizes: Sizes) -> int:
        """What is remembered between two sums of all parameters."""
        return _priced(options, sizes).held()

    def _subject(self, key: str, tensor: Tensor, shapes: Shapes | None) -> Subject:
        given = tuple(shapes or [tensor.shape])
        return Subject(given, tensor.dtype, derive_seed(self.seed, "codec", key), self.wire.rank)

    def _take(self, key: str, device: torch.device) -> State:
        prefix = f"codec/{key}/"
        names = [name for name in self._loaded if name.startswith(prefix)]
        return {n.removeprefix(prefix): self._loaded.pop(n).to(device, copy=True) for n in names}


def refit(states: Sequence[State], rank: int, world_size: int) -> State:
    """The state that `rank` of `world_size` continues with, from that of `len(states)` ranks: see `load_state_dict`.

    Only for another number of ranks is more than this rank's own state read.
    """
    if len(states) == world_size:
        return {name: tensor for name, tensor in states[rank].items() if name.startswith("codec/")}
    states = list(states)
    fitted = {}
    for name in dict.fromkeys(name for state in states for name in state if name.startswith("codec/")):
        parts = [state[name] for state in states if name in state]
        key, part = name.rsplit("/", 1)
        if part in ("residual", "velocity"):
            fitted[name] = torch.stack(parts).sum(0) / world_size
        elif part == "server.residual":
            numel = states[0][f"{key}/residual"].numel()
            chunk = -(-numel // world_size)
            padded = torch.cat([torch.cat(parts)[:numel], parts[0].new_zeros(world_size * chunk - numel)])
            fitted[name] = padded[rank * chunk : (rank + 1) * chunk].clone()
        else:
            fitted[name] = parts[0]
    return fitted


def warm(options: StrategyConfig) -> StrategyConfig:
    """The options as they are after the warm-up."""
    return options.model_copy(update={"codec_warmup": 0})


def _priced(options: StrategyConfig, sizes: Sizes) -> Channel:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[sizes.itemsize]
    return Channel(warm(options), Subject(tuple(sizes.shapes), dtype), sizes.world_size)
