"""Checkpoints of models as a run leaves them, without the run."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal import checkpoint
from shoal.checkpoint import Progress
from shoal.layouts.base import whole_model
from shoal.models.export import describe
from shoal.tensors import tensor_files
from shoal.tensors.piece import Block


def saved(model: nn.Module, tokenizer: Any, folder: Path, *, ranks: int = 1, dim: int = 0) -> Path:
    """`folder` with a checkpoint of `model`: whole, or cut along `dim` (or the last one) over so many ranks."""
    tensors = {n: t.detach() for n, t in checkpoint.model_tensors(whole_model(model, model)).items()}
    progress, about = Progress(step=1, tokens=7), partial(describe, model, tokenizer)
    if ranks == 1:
        checkpoint.write(folder, {"model/model.safetensors": tensors}, progress, about)
        return folder
    parts = folder.with_name("parts")
    for rank in range(ranks):
        held, places = piece_of(tensors, rank, ranks, dim)
        (parts / "model").mkdir(parents=True, exist_ok=True)
        tensor_files.write(parts / checkpoint.rank_file("model", rank), held, places)
    checkpoint.write(folder, {}, progress, about, parts=parts)
    return folder


def piece_of(
    tensors: dict[str, torch.Tensor], rank: int, ranks: int, dim: int
) -> tuple[dict[str, torch.Tensor], tensor_files.Places]:
    """What one of the ranks holds, and where it belongs; the last ones may hold nothing."""
    held, places = {}, {}
    for name, tensor in tensors.items():
        if not tensor.dim():  # which every rank has
            held[name] = tensor
            continue
        along = min(dim, tensor.dim() - 1)
        size = -(-tensor.shape[along] // ranks)
        first = min(rank * size, tensor.shape[along])
        held[name] = tensor.narrow(along, first, min(size, tensor.shape[along] - first))
        offset = tuple(first if d == along else 0 for d in range(tensor.dim()))
        block = Block((0,) * tensor.dim(), offset, tuple(held[name].shape))
        places[name] = (tuple(tensor.shape), (block,))
    return held, places
