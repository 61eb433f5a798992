"""Reads the tensors of a checkpoint into a replica, whatever the layout of either."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import UserError
from shoal.layouts.base import PlacedModel
from shoal.optim.optimizers import LIKE_PARAMETER, NamedState
from shoal.tensors import tensor_files
from shoal.tensors.piece import Piece
from shoal.tensors.tensor_files import CODES, SCALE, Stored


def model_tensors(placed: PlacedModel, *, buffers: bool = True) -> dict[str, Tensor]:
    """This rank's pieces of the parameters, and the buffers that belong to the model's state, by name."""
    params = {piece.name: piece.local.detach() for piece in placed.pieces}
    known = {id(p) for p in placed.model.parameters()}
    state = placed.model.state_dict(keep_vars=True) if buffers else {}
    return params | {name: t for name, t in state.items() if id(t) not in known and name not in params}


def load_model(folder: Path, placed: PlacedModel, part: dict[str, Tensor] | None = None) -> None:
    """Copy a checkpoint's parameters and buffers into a model, however either is cut; refuse those of another model.

    `part` are this rank's own ones, where the replicas differed.
    """
    own = model_tensors(placed)
    asked = f"resume from {folder}"
    if part:
        tensor_files.check(_specs(part), _specs(own), asked)
        for name, tensor in own.items():
            tensor.copy_(part[name])
        return
    saved = Stored(folder / "model")
    places = {piece.name: piece for piece in placed.pieces}
    whole = {name: (piece.local.dtype, tuple(piece.shape)) for name, piece in places.items()}
    tensor_files.check(saved.specs, _specs(own) | whole, asked)
    for name, tensor in own.items():
        if tensor.numel():
            held = places.get(name)
            tensor.copy_(saved.piece(name, held.blocks, tensor.shape) if held else saved.read(name))


def load_optimizer(
    folder: Path, state: NamedState, placed: PlacedModel, part: dict[str, Tensor] | None = None
) -> None:
    """Set the optimizers' state to that of a checkpoint: to `part`, if given. Refuses that of another model."""
    asked = f"resume from {folder}"
    saved = Stored(folder / "optimizer")
    held = {piece.name: piece for piece in placed.pieces}
    by_param: dict[str, list[str]] = {}
    specs = saved.specs if part is None else _specs(part)
    for name, (dtype, shape) in specs.items():
        param, kind = name.rsplit("/", 1)
        by_param.setdefault(param, []).append(name)
        if param not in held:
            raise UserError(asked, f"it holds {name}, of no parameter of the model", tensor_files.ANOTHER)
        wanted = held[param].shape if part is None else held[param].local.shape
        if kind.removesuffix(CODES) in LIKE_PARAMETER and shape != tuple(wanted):
            raise UserError(
                asked, f"{name} has shape {shape}, the model's is {tuple(wanted)}", tensor_files.ANOTHER
            )
        if kind.endswith(CODES):
            _check_scales(asked, name, dtype, shape, specs)

    def read(name: str, piece: Piece) -> Tensor:
        if part is not None:
            return part[name]
        if not saved.shapes[name]:  # a count of steps is not cut
            return saved.read(name)
        if name.endswith(SCALE):
            return _for_each(saved, name, piece)
        return saved.piece(name, piece.blocks, piece.local.shape)

    state.load(
        lambda param: {name.rsplit("/", 1)[1]: read(name, held[param]) for name in by_param.get(param, [])}
    )


def _check_scales(
    asked: str,
    codes: str,
    dtype: torch.dtype,
    shape: tensor_files.Shape,
    specs: Mapping[str, tensor_files.Spec],
) -> None:
    """Raise UserError where codes are not one byte each, with a scale for every so many along the last dim."""
    scales = specs.get(codes.removesuffix(CODES) + SCALE, (None, ()))[1]
    fit = (
        len(scales) == len(shape) > 0
        and scales[:-1] == shape[:-1]
        and scales[-1]
        and not shape[-1] % scales[-1]
    )
    if dtype != torch.uint8 or not fit:
        found = f"{codes} are {dtype} {shape} with scales {scales}, which do not fit"
        raise UserError(asked, found, tensor_files.ANOTHER)


def _for_each(saved: Stored, name: str, piece: Piece) -> Tensor:
    """For each value of a piece the number that it has in a tensor with one for every so many along the last dim."""
    of_each = piece.shape[-1] // saved.shapes[name][-1]
    found = torch.empty(piece.local.shape)
    for block in piece.blocks:
        (*rows, first), (*sizes, wide) = block.offset, block.size
        begin, end = first // of_each, -(-(first + wide) // of_each)
        numbers = saved.read(name, (*rows, begin), (*sizes, end - begin)).repeat_interleave(of_each, -1)
        found[block.where] = numbers.narrow(-1, first - begin * of_each, wide)
    return found


class Parts(Sequence[dict[str, Tensor]]):
    """What ranks that saved held alone, below one heading ("sync", "model", "optimizer"); read when asked for.

    They are those with the `first` place in islands of `every` ranks: all that agreed with each other. The one asked
    for last is kept: ask for all that is wanted of one before the next.
    """

    def __init__(self, folder: Path, heading: str, first: int = 0, every: int = 1) -> None:
        self.files = sorted((folder / "ranks").glob("*.safetensors"))[first::every]
        self.prefix = f"{heading}/"
        self._last: tuple[Path | None, dict[str, Tensor]] = (None, {})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rank: Any) -> Any:
        if self._last[0] != self.files[rank]:
            self._last = (None, {})  # free, before there are two
            self._last = (self.files[rank], self._read(rank))
        return self._last[1]

    def _read(self, rank: int) -> dict[str, Tensor]:
        with tensor_files.opened(self.files[rank]) as file:
            names = [name for name in file.keys() if name.startswith(self.prefix)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(self.prefix): file.get_tensor(name) for name in names}


def load_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint; empty if there is no such file."""
    if not (folder / file).exists():
        return {}
    with tensor_files.opened(folder / file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def _specs(tensors: dict[str, Tensor]) -> dict[str, tensor_files.Spec]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
