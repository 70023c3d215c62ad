"""A transformer class and a sampling loop of your own, and a schedule planned for them."""

from typing import Any

import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import Budget, Scheduled, plan


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class MyTransformer(nn.Module):
    """A transformer of your own: no name in it matters, and no class is registered anywhere."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.enter, self.leave = nn.Linear(8, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x) + self.time(t[:, None, None] / 1000)
        for block in self.blocks:
            h = block(h)
        return self.leave(h)


def sample(model: Any, seed: int) -> Tensor:
    """Eight steps of Euler; the noise depends on the seed alone."""
    x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(8):
        x = x - model(x, torch.full((4,), 1000.0 * (1 - step / 8))) / 8
    return x


torch.manual_seed(0)
model = MyTransformer().eval()
lazy = lazy_compile.transform(model)
with torch.no_grad():
    dense, computed = sample(model, seed=0), sample(lazy, seed=0)

lazy.policy = Scheduled(plan(lazy, sample, Budget(compute_ratio=0.7)))
with torch.no_grad():
    planned = sample(lazy, seed=0)
print("branches:", ", ".join(branch.name for branch in lazy.branches))
print(f"error of the plan: {(planned - dense).square().mean().sqrt():.4f}")
print("equal while nothing is reused:", torch.allclose(dense, computed, atol=1e-5))
print(f"lazy ratio {lazy.stats.lazy_ratio:.2f}, compute ratio {lazy.stats.compute_ratio:.2f}")
