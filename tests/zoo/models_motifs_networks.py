"""Whole networks inside one add: what a denoiser returns is a share of its input and a share of what it computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.inputs import latents
from zoo.registry import Family, zoo_model

CHANNELS = 8


def magnitude_preserving_sum(first: Tensor, second: Tensor, share: float) -> Tensor:
    return first.lerp(second, share) / math.sqrt((1 - share) ** 2 + share**2)


class Block(nn.Module):
    """Two convolutions, then attention of one head over all pixels (EDM2, arXiv 2312.02696)."""

    def __init__(self, entering: int, width: int, *, attends: bool) -> None:
        super().__init__()
        self.enter = nn.Conv2d(entering, width, 1, bias=False) if entering != width else nn.Identity()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.scale = nn.Linear(16, width, bias=False)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False) if attends else None
        self.out = nn.Conv2d(width, width, 1, bias=False) if attends else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.first(F.silu(x)) * (self.scale(c) + 1)[..., None, None]
        x = magnitude_preserving_sum(x, self.second(F.silu(y)), 0.3)
        if self.qkv is None or self.out is None:
            return x
        q, k, v = F.normalize(self.qkv(x).unflatten(1, (-1, 3)).flatten(-2), dim=1).unbind(2)
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(q.shape[1])).softmax(-1)
        attended = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
        return magnitude_preserving_sum(x, self.out(attended), 0.3)


class Preconditioned(nn.Module):
    """A U-Net of two levels; its noise level is embedded by learned frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies, self.noise = nn.Linear(1, 16), nn.Linear(16, 16)
        self.enter, self.leave = nn.Conv2d(4, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.down = nn.ModuleList(
            [Block(CHANNELS, CHANNELS, attends=False), Block(CHANNELS, 2 * CHANNELS, attends=True)]
        )
        self.middle = Block(2 * CHANNELS, 2 * CHANNELS, attends=True)
        self.up = nn.ModuleList(
            [Block(4 * CHANNELS, 2 * CHANNELS, attends=True), Block(3 * CHANNELS, CHANNELS, attends=True)]
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        sigma = noise[:, None, None, None]
        total = (sigma**2 + 0.25).sqrt()
        result = self.unet(x / total, noise.log() / 4)
        return 0.25 / total**2 * x + sigma * 0.5 / total * result

    def unet(self, x: Tensor, noise: Tensor) -> Tensor:
        c = F.silu(self.noise(torch.cos(2 * math.pi * self.frequencies(noise[:, None]))))
        first = self.down[0](self.enter(x), c)
        second = self.down[1](F.avg_pool2d(first, 2), c)
        h = self.middle(second, c)
        h = self.up[0](torch.cat([h, second], dim=1), c)
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.leave(self.up[1](torch.cat([h, first], dim=1), c))


@zoo_model("motif-networks-preconditioned")
def preconditioned() -> Family:
    return Preconditioned(), {"x": latents(4, 8, 8), "noise": torch.full((2,), 1.5)}
