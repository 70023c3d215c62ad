"""A model in the style of research code, with a block that each test brings along."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import LazyModule

WIDTH = 16
TOKENS = (torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.9]))

Body = Callable[["Stranger", Tensor], Tensor]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Stranger(nn.Module):
    """Two blocks of one kind between a first and a last projection; ``block`` is what one does with its stream."""

    def __init__(self, block: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = block
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.up, self.down, self.bilinear = (
            nn.Linear(WIDTH, 48),
            nn.Linear(WIDTH, WIDTH),
            nn.Bilinear(WIDTH, WIDTH, WIDTH),
        )
        self.mlp, self.norm, self.gru = mlp(), nn.BatchNorm1d(WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.matrix, self.vector = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.heads = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + t[:, None, None]
        for _ in range(2):
            x = self.block(self, x)
        return self.last(x)


def lazily(model: nn.Module, *inputs: Tensor) -> LazyModule:
    return lazy_compile.transform(model.eval(), inputs, reuse="last")
