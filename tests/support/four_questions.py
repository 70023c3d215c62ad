"""What every host of a lazy model is asked: exact, lazy, requests apart, and given back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazy_compile import AlwaysCompute, CacheSchedule
from support.layers import TOKENS, WIDTH

STEPS = 8

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""From latents ``float[B, TOKENS, WIDTH]`` and times ``float[B]``."""


@dataclass(frozen=True)
class Hosted:
    """A lazy model in a host.

    Attributes:
        dense: the host's own, without this package.
        lazy: the same with it.
        owner: what has ``policy``, ``stats`` and ``reset_stats``.
        give_back: undoes it, and returns the host's own.
        branches: how many there are.
        error: by how much runtimes differ; 0 for the same bits.
    """

    dense: Denoiser
    lazy: Denoiser
    owner: Any
    give_back: Callable[[], Denoiser]
    branches: int
    error: float = 0.0


def answer(hosted: Hosted) -> None:
    """Ask the four questions."""
    dense = [sample([hosted.dense], [seed])[0] for seed in (1, 2)]
    hosted.owner.policy = AlwaysCompute()
    assert_close(sample([hosted.lazy], [1])[0], dense[0], hosted.error)

    hosted.owner.policy = "fast"
    alone = [sample([hosted.lazy], [seed])[0] for seed in (1, 2)]
    assert hosted.owner.stats.lazy_ratio > 0
    assert (alone[0] - dense[0]).abs().max() > 10 * hosted.error

    hosted.owner.policy = CacheSchedule.every(2, STEPS, hosted.branches)
    alone = [sample([hosted.lazy], [seed])[0] for seed in (1, 2)]
    hosted.owner.reset_stats()
    for one, other in zip(sample([hosted.lazy] * 2, [1, 2]), alone, strict=True):
        assert_close(one, other, hosted.error)
    assert hosted.owner.stats.lazy_ratio == 0.5

    assert torch.equal(sample([hosted.give_back()], [1])[0], dense[0])


@torch.no_grad()
def sample(denoisers: Sequence[Denoiser], seeds: Sequence[int]) -> list[Tensor]:
    """Several requests, step by step in turns."""
    latents = [torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    for step in range(STEPS):
        times = torch.full((2,), 1000.0 * (1 - step / STEPS))
        latents = [
            x - denoiser(x, times).clone() / STEPS for x, denoiser in zip(latents, denoisers, strict=True)
        ]  # fmt: skip
    return latents


def assert_close(seen: Tensor, expected: Tensor, error: float) -> None:
    torch.testing.assert_close(seen, expected, atol=error, rtol=error)
