"""Inputs of zoo models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH, WORDS = 2, 5
"""Rows of a call, and tokens of its text."""


def latents(*shape: int) -> Tensor:
    """``float[2, *shape]``"""
    return torch.randn(BATCH, *shape)


def text(width: int, words: int = WORDS) -> Tensor:
    """``float[2, words, width]``"""
    return torch.randn(BATCH, words, width)


def timestep(value: float = 500.0) -> Tensor:
    """``float[2]``; models that count time in whole steps take ``.long()``."""
    return torch.full((BATCH,), value)


def flux_inputs(axes: int = 3) -> dict[str, Any]:
    """Sixteen patches of 16 channels and their positions, as the FLUX family takes them."""
    return {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": text(12),
        "timestep": timestep(0.5),
        "img_ids": torch.nn.functional.pad(torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)), (axes - 2, 0)),
        "txt_ids": torch.zeros(WORDS, axes),
    }
