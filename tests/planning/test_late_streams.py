"""Plans for samplers of which a stream begins late, is left out at a step, or is called twice at one timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import Budget, LazyModule, Scheduled, plan
from lazy_compile.integrations.diffusers import SchedulerSampler
from lazy_compile.planning.replay import replayable, replayed_steps
from lazy_compile.planning.search import SearchOptions
from lazy_compile.runtime.sampling import count_steps
from support.sampling import lazy_tiny_dit
from support.toy_models import TOYS, call

diffusers = pytest.importorskip("diffusers")

TIMES = (900.0, 750.0, 600.0, 450.0, 300.0, 150.0)


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


def guided(steps: range) -> Callable[[Any, int], Tensor]:
    """A second call, under another condition, at some of the steps."""

    def sample(denoiser: Any, seed: int) -> Tensor:
        x = torch.randn(2, *TOYS["dit"].shapes["x"], generator=torch.Generator().manual_seed(seed))
        label = torch.tensor([1, 2])
        for step, time in enumerate(TIMES):
            moved = denoiser(x, torch.full((2,), time), label)
            if step in steps:
                other = denoiser(x, torch.full((2,), time), 0 * label)
                moved = other + 3.0 * (moved - other)
            x = x + 0.1 * moved
        return x

    return sample


def scheduled(name: str, **options: Any) -> Callable[[Any, int], Tensor]:
    return SchedulerSampler(getattr(diffusers, name)(**options), call(TOYS["dit"]), steps=6)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(guided(range(2, 6)), id="guidance that begins late"),
        pytest.param(guided(range(3)), id="guidance that ends early", marks=pytest.mark.slow),
        pytest.param(scheduled("PNDMScheduler", skip_prk_steps=True), id="PNDM", marks=pytest.mark.slow),
        pytest.param(scheduled("HeunDiscreteScheduler"), id="Heun"),
        pytest.param(scheduled("DDIMScheduler", clip_sample=True), id="DDIM that clips"),
    ],
)
def test_a_plan_meets_its_budget(lazy: LazyModule, sample: Callable[[Any, int], Tensor]) -> None:
    lazy.reset()
    schedule = plan(lazy, sample, Budget(lazy_ratio=0.25), options=SearchOptions(rounds=0))
    calls: list[int] = []
    sample(lambda *args, **kwargs: (calls.append(1), lazy.original(*args, **kwargs))[1], 0)
    assert schedule.steps <= len(calls)
    lazy.policy = Scheduled(schedule)
    lazy.reset_stats()
    samples = sample(lazy, 0)
    assert torch.isfinite(samples).all()
    assert 0.1 < lazy.stats.lazy_ratio <= 0.3
    assert np.isfinite(schedule.lazy_ratio)


def test_a_second_call_at_one_timestep_is_a_step_of_its_own(lazy: LazyModule) -> None:
    sample = scheduled("PNDMScheduler", skip_prk_steps=True)  # 6 timesteps, the second of them twice
    assert count_steps(lazy, sample, 0) == replayed_steps(replayable(lazy), sample, 0) == 7
