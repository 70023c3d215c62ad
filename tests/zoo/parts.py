"""What zoo models share: blocks between tokens in and tokens out, and where the tokens of an image are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.layers import TOKENS, WIDTH, TimeEmbedding, norm
from zoo.inputs import latents, timestep
from zoo.registry import Family

CHANNELS = 8


class Denoiser(nn.Module):
    """Blocks on tokens ``float[B, N, WIDTH]``, each with the embedded timestep ``float[B, 1, WIDTH]``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.time, self.final = nn.Linear(CHANNELS, WIDTH), TimeEmbedding(), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.final(norm(self.run(self.embed(x), self.time(timestep).unsqueeze(1))))

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return h


def denoiser(*blocks: nn.Module) -> Family:
    return Denoiser(*blocks), token_call()


def token_call() -> dict[str, Tensor]:
    return {"x": latents(TOKENS, CHANNELS), "timestep": timestep()}


def grid(rows: int, columns: int) -> Tensor:
    """``float[rows * columns, 3]``: the position (0, row, column) of each token of an image."""
    places = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
    return nn.functional.pad(places, (1, 0))
