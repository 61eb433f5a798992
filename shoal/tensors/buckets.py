"""The gradients of one replica in a few flat buffers, each announced as soon as it is complete."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from shoal.tensors.piece import Piece
from shoal.tensors.tree_sum import TreeSum


class Bucket:
    """Gradients that are sent together: `flat` [n], of which every piece's `.grad` becomes a view.

    `flat` is padded with zeros to a multiple of `multiple`, so that it cuts into equal parts. Its dtype is the
    parameters' `grad_dtype`: their own, or a wider one for the sum of many gradients.
    """

    def __init__(self, pieces: list[Piece], multiple: int) -> None:
        self.pieces = pieces
        self.params = [piece.local for piece in pieces]
        numel = sum(p.numel() for p in self.params)
        padded = -(-numel // multiple) * multiple
        self.flat = torch.zeros(padded, dtype=self.params[0].grad_dtype, device=self.params[0].device)
        self.views = dict(self.parts(self.flat))
        self._grads = {piece: piece.wrap(self.views[piece.local]) for piece in pieces}
        self.tree = TreeSum()  # exact mode: the sums over this rank's micro-batches
        self.missing = 0

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of its pieces, in their order in `flat`."""
        return [p.shape for p in self.params]

    def parts(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameter of each piece, and the view of `flat` [n] that is its own."""
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, flat[: sum(sizes)].split(sizes), strict=True):
            yield p, part.view_as(p)

    def clear(self) -> None:
        """Drop all gradients: the next ones are copied in, which costs less than zeros and an addition."""
        for piece in self.pieces:
            piece.source.grad = None

    def take(self, piece: Piece) -> None:
        """Copy the gradient of `piece`, or zeros if there is none, into the buffer."""
        view, held = self.views[piece.local], self._grads[piece]
        if piece.source.grad is None:
            view.zero_()
        elif piece.source.grad is not held:
            view.copy_(piece.unwrap(piece.source.grad))
        piece.source.grad, piece.local.grad = held, view


class Buckets:
    """All gradients of a replica, in the reverse order of its parameters: as the backward pass makes them.

    The layout depends on the parameters and `bucket_bytes` alone, and never changes during a run. In a step each
    bucket is announced to `on_complete` exactly once, in their order, whichever parameters got a gradient: during
    the last backward pass, if each micro-batch has one (`listen`), else after it.
    """

    def __init__(
        self,
        pieces: list[Piece],
        *,
        bucket_bytes: int,
        multiple: int = 1,
        exact: bool = False,
        listen: bool = True,
    ) -> None:
        self.all = [Bucket(group, multiple) for group in _cut(list(reversed(pieces)), bucket_bytes)]
        self.exact = exact
        self.scale = 1.0  # of the loss: complete gradients are divided by it
        self.on_begin: Callable[[], object] = lambda: None  # before the first forward pass of a step
        self.on_complete: Callable[[Bucket], object] = lambda bucket: None
        self._leaf = 0
        self._last = False
        self._announced = len(self.all)
        self._places = {piece.source: (piece, bucket) for bucket in self.all for piece in bucket.pieces}
        # The garbage collector does not follow hooks: a strong reference in one would keep the model for ever.
        ours = weakref.ref(self)
        for p in self._places if listen else ():
            p.register_post_accumulate_grad_hook(
                lambda p: buckets._arrived(p) if (buckets := ours()) else None
            )

    def listen(
        self,
        *,
        on_begin: Callable[[], object] = lambda: None,
        on_complete: Callable[[Bucket], object] = lambda bucket: None,
    ) -> None:
        """Announce the beginning of a step and each complete bucket to these, in place of those before."""
        self.on_begin, self.on_complete = on_begin, on_complete

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.all)

    def begin(self, leaf: int, *, first: bool, last: bool) -> None:
        """Before the forward and backward pass of micro-batch `leaf`, the `first` or `last` one of this rank's share.

        In exact mode every micro-batch's gradients stand alone in `flat` before they enter the bucket's tree.
        """
        if first:
            self.on_begin()
        self._leaf, self._last, self._announced = leaf, last, 0
        for bucket in self.all:
            bucket.missing = len(bucket.pieces)
            if first or self.exact:
                bucket.clear()

    def end(self) -> None:
        """After that backward pass: finish the buckets that wait for parameters to which no gradient came."""
        for bucket in self.all:
            if bucket.missing:
                for piece in bucket.pieces:
                    bucket.take(piece)
        self._advance(lambda bucket: True)

    def _arrived(self, p: nn.Parameter) -> None:
        piece, bucket = self._places[p]
        bucket.take(piece)
        bucket.missing -= 1
        self._advance(lambda bucket: bucket.missing == 0)

    def _advance(self, ready: Callable[[Bucket], bool]) -> None:
        while self._announced < len(self.all) and ready(self.all[self._announced]):
            bucket = self.all[self._announced]
            self._announced += 1
            if self.scale != 1 and (self.exact or self._last):
                bucket.flat.div_(self.scale)
            if self.exact:
                bucket.tree.add(self._leaf, bucket.flat)
            if self._last:
                self.on_complete(bucket)


def _cut(pieces: list[Piece], bucket_bytes: int) -> list[list[Piece]]:
    """Runs of pieces of one dtype and device, closed as soon as they reach `bucket_bytes`."""
    groups: list[list[Piece]] = []
    size, kind = 0, None
    for piece in pieces:
        p = piece.local
        if not groups or size >= bucket_bytes or (p.dtype, p.device) != kind:
            groups.append([])
            size, kind = 0, (p.dtype, p.device)
        groups[-1].append(piece)
        size += p.nbytes
    return groups
