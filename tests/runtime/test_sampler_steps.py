"""What a step made of latents belongs to the call that was made with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile.runtime.fingerprint import LATENTS, read, samples_of
from lazy_compile.runtime.positions import Position, Trajectory
from lazy_compile.runtime.sampler_steps import LATEST, SamplerSteps, named_steps, note_sampler_steps


def noise(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 16, 8, generator=torch.Generator().manual_seed(seed))


def position(latents: Tensor) -> Position:
    return Position(Trajectory(), 0, 500.0, read({"x": samples_of(latents)})["x"][0])


def noted(before: Tensor, after: Tensor, *positions: Position) -> list[int]:
    """How many steps were noted at each position."""
    steps = SamplerSteps()
    steps.note(before, after)
    waiting = steps.waiting()
    note_sampler_steps(read(named_steps(waiting)), positions)
    steps.drop(waiting)
    assert not steps.waiting()
    return [len(each.returned) for each in positions]


def test_a_step_is_noted_where_the_model_was_called_with_a_multiple_of_its_latents() -> None:
    latents, after = noise(0, rows=2), noise(1, rows=2)
    first, second, other = position(0.3 * latents[:1]), position(latents[1:]), position(noise(2))
    assert noted(latents, after, first, second, other) == [1, 1, 0]
    for row, each in enumerate((first, second)):
        assert np.array_equal(each.returned[0].values[LATENTS], samples_of(after)[row].numpy())


@pytest.mark.parametrize(("near", "expected"), [(1e-3, [1, 0]), (1e-9, [1, 1])])
def test_of_positions_that_are_nearly_alike_it_is_the_one_that_is_the_same(near: float, expected: list[int]) -> None:
    latents = noise(0)
    assert noted(latents, noise(1), position(latents), position(latents + near * noise(3))) == expected


def test_in_half_precision_it_is_the_only_one_that_is_near() -> None:
    latents = noise(0)
    halved, beside = position((0.3 * latents).half()), position((0.3 * latents + 1e-3 * noise(3)).half())
    assert noted(latents, noise(1), halved) == [1]
    assert noted(latents, noise(1), halved, beside) == [1, 0]


def test_steps_that_nobody_reads_are_dropped() -> None:
    steps = SamplerSteps()
    for seed in range(3 * LATEST):
        steps.note(noise(seed), noise(seed))
    assert len(steps.waiting()) == LATEST
    steps.note(noise(0), noise(0)[:, :8])  # of other latents
    assert len(steps.waiting()) == LATEST
    steps.drop(steps.waiting())
    assert not steps.waiting()
