"""Random features of images, in the place of an Inception network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Features(nn.Module):
    """Few enough for few images; torchmetrics asks for their number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count
        self.register_buffer("weight", torch.randn(3 * 16, count, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        return pooled.flatten(1) @ self.weight


def extractors() -> tuple[nn.Module, nn.Module]:
    return Features(3), Features(5)
