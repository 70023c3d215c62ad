"""A sampling loop small enough to read, for tests of calibration and planning."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lazy_compile import AlwaysCompute, LazyModule, transform
from lazy_compile.calibration.calibrator import StepPair
from support.toy_models import randomize
from support.toy_networks import TinyDiT

STEPS = 6


def timesteps() -> list[float]:
    return [1000.0 - 160.0 * step for step in range(STEPS)]


def inputs(x: Tensor, timestep: float) -> dict[str, Any]:
    return {"x": x, "t": torch.full((len(x),), timestep), "y": torch.arange(len(x)) % 10}


def start(seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def sample(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
    """Euler steps from noise."""
    x = start(seed)
    with torch.no_grad():
        for timestep in timesteps():
            x = x - 0.1 * denoiser(**inputs(x, timestep))
    return x


def step_pairs(count: int) -> list[StepPair]:
    before, now = timesteps()[2:4]
    return [
        StepPair(inputs(start(seed), before), inputs(0.98 * start(seed), now), start(seed + 100))
        for seed in range(count)
    ]


def lazy_tiny_dit(**options: Any) -> LazyModule:
    """A transformed TinyDiT that computes everything; captured once, since that takes longer than most tests."""
    lazy = _captured(**options)
    lazy.policy = AlwaysCompute()
    return lazy


@cache
def _captured(**options: Any) -> LazyModule:
    return transform(randomize(TinyDiT()).eval(), inputs(start(0), 1000.0), **options)
