"""A connection between a worker and a server: headers over a pair of processes; tensors too, or in shared memory.

Shared memory is used where both ends run on one machine, in one network. That both see the same files is not enough:
hosts may be network namespaces of one machine, to try slow links. It saves a copy through the network stack at each
end. A lost process still shows on the pair.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.servers.messages import HEADER_BYTES
from shoal.wire.hosts import machine_id
from shoal.wire.pairs import Pair, Work

SHARED_FOLDER = Path("/dev/shm")
HEADER, NUMBERS, PAYLOAD, STATE = range(4)  # channels
ALIGNMENT = 64  # bytes: where a tensor of any type may begin
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64)}


@dataclass
class Connection:
    """One end. The caller fills `outgoing` (bytes) before `send(payload=True)`; `receive_payload` fills `incoming`.

    Both stay as they are until the other end has answered.
    """

    pair: Pair
    outgoing: Tensor
    incoming: Tensor
    shared: bool
    bytes_sent: int = 0  # of payloads, those through shared memory too
    expected: Work | None = None  # the payload that is being received

    def send(self, header: Tensor, numbers: Tensor | None = None, *, payload: bool = False) -> list[Work]:
        """Begin to send a header and what belongs to it."""
        works = [self.pair.start_send(header, HEADER)]
        if numbers is not None and numbers.numel():
            works.append(self.pair.start_send(numbers, NUMBERS))
        if payload:
            self.bytes_sent += self.outgoing.nbytes
            if not self.shared:
                works.append(self.pair.start_send(self.outgoing, PAYLOAD))
        return works

    def finish(self, works: list[Work]) -> None:
        """Wait until all of it has been sent."""
        for work in works:
            self.pair.finish(work)

    def receive_header(self) -> Tensor:
        """The next header."""
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self.pair.receive(header, HEADER)
        return header

    def receive_numbers(self, count: int) -> Tensor:
        """The numbers that belong to it."""
        numbers = torch.empty(count, dtype=torch.float64)
        if count:
            self.pair.receive(numbers, NUMBERS)
        return numbers

    def expect_payload(self) -> None:
        """Begin to receive a payload before its header has come, so that its sender need not wait."""
        if not self.shared and self.expected is None:
            self.expected = self.pair.start_receive(self.incoming, PAYLOAD)

    def receive_payload(self) -> None:
        """Receive the tensor that belongs to it into `incoming`."""
        self.expect_payload()
        if self.expected is not None:
            self.pair.finish(self.expected)
            self.expected = None

    def send_text(self, text: str) -> None:
        """Send text, whose length in bytes the other end knows."""
        self.pair.send(torch.tensor([*text.encode()], dtype=torch.uint8), NUMBERS)

    def receive_text(self, nbytes: int) -> str:
        """The text."""
        text = torch.empty(nbytes, dtype=torch.uint8)
        self.pair.receive(text, NUMBERS)
        return bytes(text.tolist()).decode()

    def send_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Send tensors that `describe` has described."""
        for tensor in tensors:
            self.pair.send(tensor.contiguous().view(-1), STATE)
            self.bytes_sent += tensor.nbytes

    def receive_tensors(self, description: str) -> dict[str, Tensor]:
        """The tensors, by name."""
        found = {}
        for name, shape, dtype in json.loads(description):
            found[name] = torch.empty(shape, dtype=DTYPES[dtype])
            self.pair.receive(found[name].view(-1), STATE)
        return found


def describe(tensors: dict[str, Tensor]) -> str:
    """Their names, shapes and types, as JSON."""
    return json.dumps([[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()])


def accept(pair: Pair, up: int, down: int, *, share_memory: bool) -> Connection:
    """The server's end, for payloads of `up` bytes from the worker and `down` bytes to it. Raises PeerLost."""
    theirs = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    pair.receive(theirs)
    path = _reserve(_aligned(up) + down) if share_memory and _text(theirs) == machine_id() else None
    try:
        pair.send(_header(str(path or "")))
        pair.receive(theirs)
        if path is not None and _text(theirs):
            received, sent = _halves(path, up)
            return Connection(pair, sent, received, shared=True)
    finally:
        if path is not None:
            path.unlink()  # its memory lasts as long as it is mapped
    return _by_network(pair, down, up)


def connect(pair: Pair, up: int, down: int) -> Connection:
    """The worker's end. Raises PeerLost."""
    pair.send(_header(machine_id()))
    theirs = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    pair.receive(theirs)
    path = Path(_text(theirs))
    seen = path.is_file()
    mapped = _halves(path, up) if seen else None
    pair.send(_header("seen" if seen else ""))
    return _by_network(pair, up, down) if mapped is None else Connection(pair, *mapped, shared=True)


def _by_network(pair: Pair, sent: int, received: int) -> Connection:
    outgoing, incoming = (torch.zeros(size, dtype=torch.uint8) for size in (sent, received))
    return Connection(pair, outgoing, incoming, shared=False)


def _reserve(size: int) -> Path | None:
    """A new file in memory; None where there is no room."""
    if not machine_id() or not SHARED_FOLDER.is_dir():
        return None
    descriptor, name = tempfile.mkstemp(prefix="shoal-", dir=SHARED_FOLDER)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a write to a page that does not exist kills the process
    except OSError:
        Path(name).unlink()
        return None
    finally:
        os.close(descriptor)
    return Path(name)


def _halves(path: Path, up: int) -> tuple[Tensor, Tensor]:
    """The bytes from the worker to the server, and those to the worker."""
    with path.open("r+b") as file:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    return whole[:up], whole[_aligned(up) :]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _header(text: str) -> Tensor:
    return torch.tensor([*text.encode().ljust(HEADER_BYTES, b"\0")], dtype=torch.uint8)


def _text(header: Tensor) -> str:
    return bytes(header.tolist()).rstrip(b"\0").decode()
