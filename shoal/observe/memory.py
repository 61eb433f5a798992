"""`--memory-report`: what held how many bytes when a step held the most, by part, with the arithmetic beside it.

Every operation of one step is watched, and with it every tensor's memory from when it is made until it is given back.
The part of it that belongs to nothing that outlives the step are activations and what is held in passing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal.layouts.base import gathered_tensors
from shoal.replica import Replica
from shoal.tensors.piece import trained

ACTIVATIONS = "activations, in passing"
COPIES = "copies on the host"  # of parameters and gradients, where the optimizer steps
MOVED = ("shoal.sync", "shoal.codecs")  # the packages whose objects hold what replicas agree by


class Watch(TorchDispatchMode):
    """Within it `peak` holds the memory of the moment that held the most, a host's too: {storage: bytes}."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak: dict[StorageWeakRef, int] = {}
        self._live: dict[StorageWeakRef, int] = {}
        self._total = self._highest = 0
        self._see(held)
        self._look()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and track its inputs and outputs."""
        found = func(*args, **(kwargs or {}))
        self._see(leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor))
        self._look()
        return found

    def _see(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key, nbytes = StorageWeakRef(storage), storage.nbytes()
                self._total += nbytes - self._live.get(key, 0)
                self._live[key] = nbytes

    def _look(self) -> None:
        """Keep what is held now if it is the most so far; only then look for tensors that are gone."""
        if self._total > self._highest:
            self._live = {key: _bytes(key) for key in self._live if not key.expired()}
            self._total = sum(self._live.values())
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self._live)


Report = dict[str, dict[str, int | None]]  # part -> "bytes" measured, "formula"


class MemoryReport:
    """Watches the second step of a run, by which the optimizer has its state, and keeps what it held at its peak.

    The step that is watched is slower. `predicted` gives the bytes of parts as arithmetic has them.
    """

    def __init__(
        self,
        replica: Replica,
        sync: Any,
        predicted: Callable[[], dict[str, int]],
        last_step: int,
        wanted: bool,
    ) -> None:
        self.report: Report | None = None
        self._parts = lambda: parts_of(replica, sync)
        self._predicted = predicted
        self._last_step = last_step
        self._wanted = wanted
        self._steps = 0

    @contextmanager
    def watching(self, number: int) -> Iterator[None]:
        """Watch the step `number`, if it is the one to watch."""
        self._steps += 1
        if not self._wanted or (self._steps < 2 and number < self._last_step):
            yield
            return
        self._wanted = False
        with Watch(tensor for part in self._parts().values() for tensor in part) as watch:
            yield
        measured, predicted = report(watch.peak, self._parts()), self._predicted()
        self.report = {p: {"bytes": found, "formula": predicted.get(p)} for p, found in measured.items()}


def parts_of(replica: Replica, sync: Any) -> dict[str, list[Tensor]]:
    """The tensors that outlive a step, by part; what belongs to several counts for the first."""
    placed, buckets = replica.placed, list(replica.buckets)
    own = {piece.local for piece in trained(placed.pieces)}
    copies = [piece.local for piece in replica.updated if piece.local not in own]
    host = {COPIES: [each for p in copies for each in (p, p.grad) if each is not None]} if copies else {}
    return {
        "parameters": [*(piece.local for piece in placed.pieces), *placed.model.buffers()],
        "gradients": [*(bucket.flat for bucket in buckets), *_reachable(bucket.tree for bucket in buckets)],
        "optimizer state": [tensor for _, tensor in replica.optimizer_state.tensors()],
        "gathered for the island": list(gathered_tensors(placed)),
        "sync and codec": list(_reachable([sync])),
    } | host


def report(peak: dict[StorageWeakRef, int], parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """The bytes of each part at the peak, and those of activations: all that is in no part."""
    left, found = dict(peak), {}
    for part, tensors in parts.items():
        keys = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
        found[part] = sum(left.pop(key, 0) for key in keys)
    return found | {ACTIVATIONS: sum(left.values())}


def _bytes(key: StorageWeakRef) -> int:
    storage = torch.UntypedStorage._new_with_weak_ptr(key.cdata)
    return 0 if storage is None else storage.nbytes()


def _reachable(roots: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor reachable from strategies, codecs and plain containers."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict):
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set):
            stack += each
        elif type(each).__module__.startswith((*MOVED, "shoal.tensors.tree_sum")) and hasattr(
            each, "__dict__"
        ):
            stack += vars(each).values()
