"""A model that is whole on disk alone, while it starts: each rank takes into memory what its layout leaves it.

The code that builds a model runs as it is, and so does the code that cuts it. What is registered as a parameter goes
to a file without a name, whose pages the system takes from memory where it needs room, and which is gone with the
last tensor that points to it. Costs each rank the model's bytes of disk, until it is cut.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shoal.errors import UserError

PLAIN = (Tensor, nn.Parameter)
SMALL = 2**16  # bytes; up to here, as vectors are, a parameter is not worth a file


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Keep parameters registered within the block in files of `folder`, which must be on a disk."""

    def registered(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and p.device.type == "cpu" and p.nbytes > SMALL and not is_on_disk(p):
            p.data = _moved(p.data, folder)

    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_room(folder, error) from error
    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def is_on_disk(tensor: Tensor) -> bool:
    """Whether its values are pages of a file."""
    return type(tensor) in PLAIN and tensor.untyped_storage().filename is not None


def cast(p: nn.Parameter, dtype: torch.dtype) -> None:
    """Hold a parameter in another dtype, where it lies now: on disk or in memory."""
    if p.dtype != dtype:
        file = p.untyped_storage().filename
        values = p.data.to(dtype)
        p.data = values if file is None else _moved(values, Path(file).parent)


def into_memory(model: nn.Module) -> None:
    """Move into memory what a layout has left of a model."""
    for p in model.parameters():
        if is_on_disk(p):
            p.data = p.data.clone()


def _no_room(folder: Path, error: OSError) -> UserError:
    found = f"a model that is cut starts on disk, and there is no room: {error.strerror}"
    return UserError(f"--cache-dir {folder}", found, "free some space, or name another")


def _moved(values: Tensor, folder: Path) -> Tensor:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".start-") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk is a signal, when a page is written
                os.posix_fallocate(file.fileno(), 0, values.nbytes)
            storage = torch.UntypedStorage.from_file(file.name, True, values.nbytes)
    except OSError as error:
        raise _no_room(folder, error) from error
    assert isinstance(storage, torch.UntypedStorage)
    return torch.empty(0, dtype=values.dtype).set_(storage).view(values.shape).copy_(values)
