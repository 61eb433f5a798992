"""The part of a model that a worker of a pipeline holds: the same model with the layers of the others left out.

The family's own forward runs on every worker, so that positions, masks and rotary tables come from the inputs, which
every worker has, and nothing but hidden states travels:

- they enter in front of the first layer of a stage, in the place of whatever came there
- they leave behind its last one, where the forward pass ends; the last stage goes on to the loss
- a layer of other stages hands on what it gets, an embedding of others gives zeros of the right shape

A worker may hold several stages. Embeddings that are tied to the head belong to the first stage; where the last one
is another worker's, that one has a copy, which follows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config import THERE_AND_BACK, LayoutConfig
from shoal.errors import UserError
from shoal.layouts import checking, stubs
from shoal.layouts.base import Function, PlacedModel
from shoal.layouts.cutting import NoStages, Watched, balance, watch
from shoal.layouts.sharded import is_recent_torch
from shoal.layouts.stubs import Left
from shoal.models import proof
from shoal.tensors.piece import Piece, empty
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Mesh


class Stages(PlacedModel):
    """The pieces of another layout that the stages of this worker need. `owners[s]` is the worker of stage s.

    A forward pass is that of the stage which `only` has chosen: it finds hidden states, in the last stage the result.
    """

    def __init__(self, inner: PlacedModel, mesh: Mesh, seen: Watched, options: LayoutConfig) -> None:
        model, axis = inner.model, mesh.axes["pipeline"]
        self.device = mesh.device
        self.generator = _generator(mesh.device)
        self.owners = owners = _owners(options, axis.size)
        self.last = len(owners) - 1
        self.mine = [stage for stage, owner in enumerate(owners) if owner == axis.index]
        self.layers = balance(*seen.costs, len(owners))
        self.width = seen.entered[0].shape[-1]
        self.dtypes = [seen.entered[own.start].dtype for own in self.layers]
        self.draws = seen.draws
        self._state_bytes = len(self.generator.get_state())
        self._list = seen.layers
        self._views = self._leave_out(seen)
        keeps_first, keeps_last = (stage in self.mine for stage in (0, self.last))
        zeros = stubs.before(seen)
        all_stubs = {module: nn.Identity() for module in seen.after} | zeros
        kept = {*(seen.before if keeps_first else []), *(seen.after if keeps_last else [])}
        left_out = {module: stub for module, stub in all_stubs.items() if module not in kept}
        stubs.put(stubs.in_places(model, left_out))
        # For later stages of whoever has the first one; of others it is empty.
        alone = {module: stub for module, stub in zeros.items() if module not in seen.after}
        self._zeros = stubs.in_places(model, alone)
        before, after = (
            {p for m in part for p in m.parameters(recurse=False)} for part in (seen.before, seen.after)
        )
        tied = before & after if owners[0] != owners[-1] else set()
        self.follows = keeps_last and not keeps_first  # the tied parameters of another worker
        self.tied = [p.name for p in inner.pieces if p.source in tied] if keeps_first or keeps_last else []
        held = set(model.parameters())
        pieces = [_own(piece, held, follows=self.follows and piece.source in tied) for piece in inner.pieces]
        super().__init__(model, pieces, inner._loss, inner)

    @contextmanager
    def only(self, stage: int, entering: Callable[[], Tensor] | None) -> Iterator[None]:
        """Have the model be one stage of this worker's; `entering` gives the hidden states when they are wanted."""
        own = self.layers[stage]
        hooks = []
        # In front of what other layouts do before a layer; behind what they do after one.
        if entering is not None:
            hooks.append(self._list[own.start].register_forward_pre_hook(self._entry(entering), prepend=True))
        if stage < self.last:
            hooks.append(self._list[own.stop - 1].register_forward_hook(stubs.leave))
        whole, self._list._modules = self._list._modules, {**self._views[stage]}
        before = [(parent, name, parent._modules[name]) for parent, name, _ in self._zeros]
        if stage:  # whoever has the first stage as well computes nothing of it
            stubs.put(self._zeros)
        try:
            yield
        finally:
            self._list._modules = whole
            stubs.put(before)
            for hook in hooks:
                hook.remove()

    def _entry(self, entering: Callable[[], Tensor]) -> Callable[[nn.Module, Any], Any]:
        def enter(layer: nn.Module, args: Any) -> Any:
            zeros, *others = args  # which have come through the layers of others
            self._begin_tokens(*zeros.shape[:2])
            return (entering(), *others)

        return enter

    def room(self, stage: int, rows: int, tokens: int) -> list[Tensor]:
        """Memory for what a stage hands on of a micro-batch: hidden states, `width` numbers for each token here.

        And the state of the random numbers, in a model that draws some.
        """
        shape, dtype = self._hidden_shape(rows, tokens), self.dtypes[stage + 1]
        hidden = torch.empty(*shape, self.width, dtype=dtype, device=self.device)
        return [hidden, torch.empty(self._state_bytes, dtype=torch.uint8, device=self.device)][
            : 1 + self.draws
        ]

    def _apply(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        try:
            return super()._apply(function, inputs)
        except Left as left:
            return left.hidden

    def _leave_out(self, seen: Watched) -> dict[int, dict[str, nn.Module]]:
        """Replace the layers of others; returns what the list is to hold in each stage of this worker's."""
        skips = stubs.skips(seen)
        layers = list(seen.layers)
        held = {index for stage in self.mine for index in self.layers[stage]}
        views: dict[int, dict[str, nn.Module]] = {
            stage: {
                str(index): layers[index] if index in self.layers[stage] else skip
                for index, skip in enumerate(skips)
            }
            for stage in self.mine
        }
        for index, skip in enumerate(skips):
            if index not in held:
                seen.layers[index] = skip
        return views

    def __str__(self) -> str:
        stages = f"stages of {' + '.join(str(len(own)) for own in self.layers)} layers"
        return stages if self._inner is None or self._inner._inner is None else f"{stages}; {self._inner}"


def look(
    placed: PlacedModel, mesh: Mesh, policy: Policy, options: LayoutConfig, nothing: dict[str, Tensor]
) -> Watched:
    """See how a whole model computes, before anything of it is cut.

    `nothing` is a micro-batch without samples. Raises UserError where the model has no such stages.
    """
    asked, model = f"--pp {mesh.size('pipeline')}", placed.model
    if not is_recent_torch():
        raise UserError(asked, f"this is torch {torch.__version__}", "install torch 2.13 or later")
    stages = len(_owners(options, mesh.size("pipeline")))
    try:
        with proof.trial(asked, "leave it out"):
            seen = watch(model, policy.autocast(mesh.device), _generator(mesh.device))
            if len(seen.layers) < stages:
                found = f"the model has {len(seen.layers)} layers, fewer than the {stages} stages"
                raise UserError(asked, found, "take a smaller number, or another model")
            layers = balance(*seen.costs, stages)
            checking.check(model, placed._loss, seen, layers, nothing, policy.autocast(mesh.device))
    except NoStages as error:
        raise UserError(asked, f"the model has no stages: {error}", "leave it out") from error
    return seen


def _owners(options: LayoutConfig, ranks: int) -> list[int]:
    """Which worker of the line has each stage: in turn, or there and back."""
    there = list(range(ranks))
    if options.schedule in THERE_AND_BACK:
        return [*there, *reversed(there)]
    return there * options.stages_per_worker


def _own(piece: Piece, held: set[nn.Parameter], *, follows: bool) -> Piece:
    if piece.source not in held:
        return empty(piece)
    return empty(piece, source=piece.source) if follows else piece


def _generator(device: torch.device) -> torch.Generator:
    """Where dropout takes its random numbers from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
