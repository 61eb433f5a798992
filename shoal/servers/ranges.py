"""The parameters cut into contiguous ranges, one for each server, as even in size as whole parameters allow."""

from torch import Tensor, nn

from shoal.optim.optimizers import NamedParams


def cut(params: NamedParams, servers: int) -> list[NamedParams]:
    """`params` in at most `servers` ranges: see `runs`."""
    return [params[run.start : run.stop] for run in runs([p.numel() for _, p in params], servers)]


def runs(sizes: list[int], servers: int) -> list[range]:
    """At most `servers` runs of parameters of these sizes, so that the largest holds as few elements as possible.

    No parameter is cut: its state keeps its name, and optimizers that need whole matrices work.
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(sizes, middle)) <= servers else (middle + 1, high)
    return _fill(sizes, low)


def parts(flat: Tensor, params: NamedParams) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter, and the view of `flat` [n] that is its own."""
    pieces = flat.split([p.numel() for _, p in params])
    return [(p, piece.view(p.shape)) for (_, p), piece in zip(params, pieces, strict=True)]


def _fill(sizes: list[int], most: int) -> list[range]:
    """Runs that hold at most `most`, each filled before the next begins."""
    filled, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held + size > most:
            filled.append(range(first, i))
            first, held = i, 0
        held += size
    return [*filled, range(first, len(sizes))]
