"""Saves a run, and knows when the tensors being saved may change again."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from shoal import checkpoint
from shoal.checkpoint import Checkpoints, Progress
from shoal.replica import Replica
from shoal.sync import Sync
from shoal.tasks import Surroundings
from shoal.tensors.tensor_files import Places


class Saver:
    """Saves the one model of all replicas, and what each rank alone holds. Every rank calls its methods."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        replica: Replica,
        sync: Sync,
        surroundings: Surroundings,
        replicas_differ: bool,
    ) -> None:
        self.checkpoints = checkpoints
        self._replica = replica
        self._sync = sync
        self._surroundings = surroundings
        self._replicas_differ = replicas_differ
        self._is_read = True  # whether no save reads parameters any more, here or on rank 0
        self._model: tuple[int, checkpoint.Tensors] = (
            -1,
            {},
        )  # what is saved of the model after so many steps

    def save(self, progress: Progress, *, best: bool = False) -> None:
        """Start to save a checkpoint of the steps done, unless one exists."""
        if not best and self.checkpoints.newest_step == progress.step:
            return
        self.wait_until_read()
        self._after_first(self.checkpoints.finish)
        self._is_read = False
        if self._model[0] != progress.step:
            with self._sync.shared_model(self._replica):
                self.keep_model(progress.step)
        describe = partial(self._surroundings.describe, self._replica.model)
        own, places = self._own_state(), self._places()
        self.checkpoints.save(self._model[1], progress, describe, part=own, places=places, best=best)

    def keep_model(self, step: int) -> None:
        """Keep what a save after `step` steps needs of the model, which is the shared one now.

        These are live tensors, but copies where the replicas differ.
        """
        self._model = (step, self._shared_tensors())

    def wait_until_read(self) -> None:
        """Wait until what is being saved has been read. Call it before parameters change."""
        if not self._is_read:
            self._after_first(self.checkpoints.wait_until_read)
            self._is_read = True

    def _after_first(self, work: Callable[[], None]) -> None:
        """Do `work`, then wait for rank 0, whose work may take longer than an exchange would wait."""
        work()
        if not self._sync.members.evaluates_alone:
            self._replica.mesh.wire("world").wait_for_first()

    def _shared_tensors(self) -> checkpoint.Tensors:
        replica, mesh = self._replica, self._replica.mesh
        if mesh.replicate.index:
            return {}
        names = ["model/model.safetensors", "optimizer/state.safetensors"]
        if replica.is_cut:
            names = [checkpoint.rank_file(folder, mesh.rank) for folder in ("model", "optimizer")]
        model = checkpoint.model_tensors(replica.placed, buffers=mesh.is_first)
        files = dict(zip(names, (model, dict(replica.optimizer_state.tensors())), strict=True))
        if self._replicas_differ:
            files = {name: {n: t.clone() for n, t in held.items()} for name, held in files.items()}
        return {name: held for name, held in files.items() if held or replica.is_cut}

    def _own_state(self) -> dict[str, Tensor]:
        """The tensors that only this rank holds; none where a save waits for nobody."""
        if self._sync.members.evaluates_alone:
            return {}
        kept = self._sync.state_dict()  # a codec's changes as soon as the next backward pass begins
        headings = {"sync": {name: tensor.clone() for name, tensor in kept.items()}}
        if self._replicas_differ:
            replica = self._replica
            headings["model"] = checkpoint.model_tensors(replica.placed)
            headings["optimizer"] = dict(replica.optimizer_state.tensors())
            scaler = replica.scaler.state_dict()
            headings["scaler"] = {name: torch.tensor(value) for name, value in scaler.items()}
        return {f"{heading}/{name}": t for heading, held in headings.items() for name, t in held.items()}

    def _places(self) -> Places | None:
        """Where the pieces of a cut replica belong in the whole tensors, by name."""
        replica = self._replica
        pieces = {piece.name: piece for piece in replica.placed.pieces} if replica.is_cut else {}
        places = {name: (tuple(piece.shape), piece.blocks) for name, piece in pieces.items()}
        for name, tensor in replica.optimizer_state.tensors() if pieces else ():
            piece = pieces[name.rsplit("/", 1)[0]]
            if tensor.dim() and tensor.dim() == piece.local.dim():
                places[name] = piece.place(tensor.shape)
        return places
