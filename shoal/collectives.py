"""The wire: every exchange between replicas goes through here, and every byte of it is counted.

Bytes are what the algorithm has a rank send (the payload of a ring or of direct exchanges), without the
headers of the transport.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import mesh

Work = dist.Work  # a started exchange: done after its `.wait()`
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13


class Wire:
    """One rank's end of the exchanges over one axis of the mesh."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_sent = 0

    def neighbours(self, size: int) -> "Wire":
        """A wire to the ranks that stand in the same run of `size` ranks; it counts for itself."""
        return Wire(mesh.neighbours(self.group, size))

    def start_all_reduce(self, tensor: Tensor) -> Work:
        """Begin to sum `tensor` in place over the ranks; the result is there after `.wait()`."""
        self.bytes_sent += 2 * self._others_part(tensor)
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def start_exchange(self, received: Tensor, counts: list[int], sent: Tensor) -> Work:
        """Begin to send the r-th of `world_size` equal parts of `sent` to rank r.

        What rank q sends, `counts[q]` elements, lands in `received` in the order of the ranks.
        """
        self.bytes_sent += self._others_part(sent)
        parts = [sent.numel() // self.world_size] * self.world_size
        return dist.all_to_all_single(received, sent, counts, parts, group=self.group, async_op=True)

    def start_all_gather(self, whole: Tensor, part: Tensor) -> Work:
        """Begin to fill `whole` [world_size * n] with every rank's `part` [n], in the order of the ranks."""
        self.bytes_sent += (self.world_size - 1) * part.nbytes
        return _all_gather(whole, part, group=self.group, async_op=True)

    def start_send(self, tensor: Tensor, rank: int) -> Work:
        """Begin to send `tensor` to `rank`. It must not change before `.wait()`."""
        self.bytes_sent += tensor.nbytes
        return _started(dist.isend(tensor, group=self.group, group_dst=rank))

    def start_receive(self, tensor: Tensor, rank: int) -> Work:
        """Begin to overwrite `tensor` with what `rank` sends: of this size, in the order in which it was sent."""
        return _started(dist.irecv(tensor, group=self.group, group_src=rank))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, in place, at once. For numbers, not for gradients."""
        self.start_all_reduce(tensor).wait()
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the one of rank 0."""
        self.bytes_sent += tensor.nbytes if self.rank == 0 else 0
        dist.broadcast(tensor, group=self.group, group_src=0)

    def share_text(self, text: str) -> str:
        """The text that rank 0 gave, on every rank. (Torch's own way would unpickle what it receives.)"""
        size = torch.tensor([len(text.encode())])
        self.broadcast(size)
        content = torch.tensor([*text.encode()] if self.rank == 0 else [0] * int(size), dtype=torch.uint8)
        self.broadcast(content)
        return bytes(content.tolist()).decode()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(self.group)

    def _others_part(self, tensor: Tensor) -> int:
        return tensor.nbytes * (self.world_size - 1) // self.world_size


def _started(work: Work | None) -> Work:
    assert work is not None, "only ranks of the group hold a wire"
    return work
