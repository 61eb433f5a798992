"""A model of as many equal layers as are asked for, on the rows of the laws: what is held of it is arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

from laws.rows import VOCABULARY, RowsTask
from torch import Tensor, nn

WIDTH = 512


def one_matrix() -> nn.Module:
    """Keeps its inputs alone."""
    return nn.Linear(WIDTH, WIDTH)


def narrow_inside() -> nn.Module:
    """Keeps more than its inputs."""
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH), nn.GELU())


class Deep(nn.Module):
    """An embedding, `depth` layers and a head."""

    def __init__(self, depth: int, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).mul(0.1)
        return self.head(hidden)


@dataclass(frozen=True)
class DeepTask(RowsTask):
    """`RowsTask` with such a model."""

    depth: int = 2
    layer: Callable[[], nn.Module] = one_matrix

    def model(self) -> nn.Module:
        return Deep(self.depth, self.layer)
