"""What a search is said to take."""

from __future__ import annotations

import torch

from lazy_compile.planning.estimate import estimate_plan
from lazy_compile.planning.search import SearchOptions
from support import planted


def test_an_estimate_counts_the_calls_and_the_outputs_of_branches() -> None:
    lazy, options = planted.planted(depends_on_sample=False), SearchOptions(rounds=1)
    estimate = estimate_plan(lazy, planted.sample, options=options)
    assert estimate.steps == planted.STEPS
    assert estimate.model_calls == options.trajectories * planted.STEPS
    assert 0 < estimate.seconds < 60
    outputs = 2 * 4 * planted.ROWS * planted.TOKENS * planted.WIDTH
    assert outputs * planted.STEPS < estimate.device_bytes == estimate.host_bytes < 4 * outputs * planted.STEPS


def test_a_sampler_that_calls_twice_a_step_takes_twice_as_many() -> None:
    lazy, options = planted.planted(depends_on_sample=False), SearchOptions(rounds=1)

    def guided(denoiser: object, seed: int) -> torch.Tensor:
        return planted.sample(lambda **given: denoiser(**given) + denoiser(**given), seed)  # type: ignore[operator]

    once, twice = (estimate_plan(lazy, sampler, options=options) for sampler in (planted.sample, guided))
    assert (twice.steps, twice.model_calls) == (once.steps, 2 * once.model_calls)
    assert twice.device_bytes > once.device_bytes
