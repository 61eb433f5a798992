"""The part of a model that a worker of a pipeline holds: the same model with the layers of the others left out.

The family's own forward runs on every worker, so that positions, masks and rotary tables come from the inputs, which
every worker has, and nothing but hidden states travels:

- they enter before the first layer of a stage, in the place of its input
- they leave after its last layer, where the forward pass ends; the last stage goes on to the result
- a layer of another stage returns its input, an embedding of another stage gives zeros of the right shape

A worker may hold several stages. Embeddings that are tied to the head belong to the first stage; if another worker
has the last one, it holds a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config import THERE_AND_BACK, LayoutConfig
from shoal.errors import UserError
from shoal.layouts import checking, stubs
from shoal.layouts.base import Function, PlacedModel, Request
from shoal.layouts.cutting import NoStages, Watched, balance, watch
from shoal.layouts.sharded import is_recent_torch
from shoal.layouts.stubs import Left
from shoal.models import proof
from shoal.tensors.piece import Piece, empty


class Stages(PlacedModel):
    """The pieces of another layout that the stages of this worker need. `owners[s]` is the worker of stage s.

    A forward pass computes the stage that `only` has chosen: it returns hidden states, in the last stage the result.
    """

    def __init__(self, inner: PlacedModel, request: Request) -> None:
        mesh, options, seen, model = request.mesh, request.options, request.watched, inner.model
        assert seen is not None, "`watch_whole` comes before"
        axis = mesh.axes["pipeline"]
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
        # For the later stages of the worker that has the first one; on other workers it is empty.
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
        """Within it the model is one stage of this worker's; `entering` returns the hidden states that enter it."""
        entry = None if entering is None else self._entry(entering)
        zeros = self._zeros if stage else []  # a worker's later stages compute nothing of its first one
        with stubs.stage(self._list, self.layers[stage], {**self._views[stage]}, zeros, entry):
            yield

    def _entry(self, entering: Callable[[], Tensor]) -> Callable[[nn.Module, Any], Any]:
        def enter(layer: nn.Module, args: Any) -> Any:
            zeros, *others = args  # from the stubs of the layers before
            self._begin_tokens(*zeros.shape[:2])
            return (entering(), *others)

        return enter

    def room(self, stage: int, rows: int, tokens: int) -> list[Tensor]:
        """Buffers for what a stage hands on of a micro-batch: hidden states, `width` numbers for each token here.

        In a model with dropout the state of the random numbers too.
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
        """Replace the layers of other workers; returns what the list holds in each stage of this worker's."""
        skips = stubs.skips(seen)
        layers = list(seen.layers)
        held = {index for stage in self.mine for index in self.layers[stage]}
        views = {stage: stubs.view(layers, skips, self.layers[stage]) for stage in self.mine}
        for index, skip in enumerate(skips):
            if index not in held:
                seen.layers[index] = skip
        return views

    def __str__(self) -> str:
        stages = f"stages of {' + '.join(str(len(own)) for own in self.layers)} layers"
        return stages if self._inner is None or self._inner._inner is None else f"{stages}; {self._inner}"


def watch_whole(placed: PlacedModel, request: Request) -> PlacedModel:
    """Note how the model computes while it is whole. Raises UserError where it has no such stages."""
    mesh, policy, options = request.mesh, request.policy, request.options
    asked, model = f"--pp {mesh.size('pipeline')}", placed.model
    if not is_recent_torch():
        raise UserError(asked, f"this is torch {torch.__version__}", "install torch 2.13 or later")
    stages = len(_owners(options, mesh.size("pipeline")))
    try:
        with proof.trial(asked, "leave it out"):
            seen = request.watched = watch(model, policy.autocast(mesh.device), _generator(mesh.device))
            if len(seen.layers) < stages:
                found = f"the model has {len(seen.layers)} layers, fewer than the {stages} stages"
                raise UserError(asked, found, "take a smaller number, or another model")
            layers = balance(*seen.costs, stages)
            checking.check(
                model, placed._loss, seen, layers, request.empty_micro_batch, policy.autocast(mesh.device)
            )
    except NoStages as error:
        raise UserError(asked, f"the model has no stages: {error}", "leave it out") from error
    return placed


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
