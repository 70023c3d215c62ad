"""A denoiser whose right decisions are known: of its two branches each kind of sample needs one, or all need both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lazy_compile import LazyModule, transform

STEPS, ROWS, TOKENS, WIDTH = 8, 16, 16, 8
MARKER, CLOCK = 0, 1
"""Channels: +1 or -1, for the kind of sample; and a signal of the time, which no line follows."""


class Planted(nn.Module):
    """``x: float[B, N, WIDTH]``, ``t: float[B]``. Of kind k, branch k follows the clock, and the other returns 0."""

    def __init__(self, depends_on_sample: bool) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for kind, up, down in zip((1.0, -1.0), self.up, self.down, strict=True):
            up.weight.data.zero_()
            up.weight.data[:, CLOCK] = torch.linspace(0.5, 1.5, WIDTH) * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
            up.bias.data.zero_()
            if depends_on_sample:
                up.weight.data[:, MARKER] = 4 * kind
                up.bias.data.fill_(-4.0)
            down.weight.data = torch.randn(WIDTH, WIDTH, generator=noise) / WIDTH
            down.weight.data[[MARKER, CLOCK]] = 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        clock = torch.sin(0.37 * t)[:, None, None] * F.one_hot(torch.tensor(CLOCK), WIDTH)
        h = x
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(F.relu(up(h + clock)))
        return h - x


def start(seed: int) -> Tensor:
    """Noise, with half of the samples of each kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    x[:, :, CLOCK] = 0.0
    x[:, :, MARKER] = (torch.randperm(ROWS, generator=generator) % 2 * 2.0 - 1.0)[:, None]
    return x


def sample(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
    x = start(seed)
    with torch.no_grad():
        for step in range(STEPS):
            x = x - 0.3 * denoiser(**inputs(x, 1000.0 - 120.0 * step))
    return x


def inputs(x: Tensor, timestep: float) -> dict[str, Any]:
    return {"x": x, "t": torch.full((len(x),), timestep)}


def planted(depends_on_sample: bool) -> LazyModule:
    return transform(Planted(depends_on_sample).eval(), inputs(start(0), 1000.0))
