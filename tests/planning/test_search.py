"""First-order answers of the final samples, and what a search makes of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.planning.linear_model import (
    _weights,
    around_another,
    fit_slopes,
    harm_of_reuse,
    predicted_error,
    swap,
    trim,
)
from lazy_compile.planning.reuse_effects import measure_effects
from lazy_compile.planning.sample_response import (
    NoGradientError,
    Response,
    cauchy_weights,
    dense_samples,
    measure_response,
)
from lazy_compile.planning.search import ScheduleSearch, SearchOptions
from lazy_compile.planning.trace import Trace
from lazy_compile.runtime.cache import CacheSlot
from support.sampling import STEPS, inputs, lazy_tiny_dit, sample, start, timesteps
from support.slow import slow_but

BRANCHES = 4


def guided(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
    """Two calls a step, as some pipelines guide."""
    x = start(seed)
    with torch.no_grad():
        for timestep in timesteps():
            given = inputs(x, timestep)
            towards, plain = denoiser(**given), denoiser(**{**given, "y": torch.full_like(given["y"], 9)})
            x = x - 0.1 * (plain + 1.5 * (towards - plain))
    return x


def in_one_batch(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
    x = start(seed)
    with torch.no_grad():
        for timestep in timesteps():
            given = inputs(torch.cat([x, x]), timestep)
            towards, plain = denoiser(**given).chunk(2)
            x = x - 0.1 * (plain + 1.5 * (towards - plain))
    return x


def turned_over(schedule: CacheSchedule, *places: tuple[int, int]) -> CacheSchedule:
    table = schedule.should_compute.copy()
    for step, branch in places:
        table[step, branch] ^= True
    return CacheSchedule(table, schedule.slopes)


def true_error(lazy: LazyModule, schedule: CacheSchedule, seeds: range) -> float:
    lazy.policy = Scheduled(schedule)
    changes = [(sample(lazy, seed) - dense_samples(lazy, sample, seed)).double().square().mean() for seed in seeds]
    return float(torch.stack(changes).mean())


@pytest.fixture(scope="module")
def lazy() -> LazyModule:
    return lazy_tiny_dit()


@pytest.fixture(scope="module")
def around_fora(lazy: LazyModule) -> Response:
    return measure_response(lazy, sample, CacheSchedule.every(2, STEPS, BRANCHES), seed=0, directions=32)


@pytest.mark.parametrize("sampler", [sample, guided, in_one_batch])
def test_the_error_of_a_schedule_nearby_is_foreseen(lazy: LazyModule, sampler: Callable[..., Tensor]) -> None:
    first = CacheSchedule.every(2, STEPS, BRANCHES)
    near = turned_over(first, (3, 1), (4, 2))
    here, there = (measure_response(lazy, sampler, schedule, seed=1, directions=4) for schedule in (first, near))
    assert here.directional_derivatives.shape[:3] == (4 * 4, STEPS, BRANCHES)
    assert here.error.shape == (16,)
    foreseen = predicted_error(here, near)
    actual = float((there.error**2).mean()) / there.size
    unmoved = float((here.error**2).mean()) / here.size
    assert foreseen == pytest.approx(actual, rel=0.1)
    assert abs(foreseen - actual) < 0.3 * abs(unmoved - actual)


def test_what_was_run_has_the_error_of_the_samples(lazy: LazyModule, around_fora: Response) -> None:
    measured = true_error(lazy, around_fora.schedule, range(1))
    assert predicted_error(around_fora, around_fora.schedule) == pytest.approx(measured, rel=0.2)


def test_fitted_slopes_help_on_other_noise(lazy: LazyModule, around_fora: Response) -> None:
    fitted = fit_slopes(around_fora, around_fora.schedule)
    assert np.array_equal(fitted.should_compute, around_fora.schedule.should_compute)
    assert predicted_error(around_fora, fitted) < predicted_error(around_fora, around_fora.schedule)
    assert true_error(lazy, fitted, range(5, 7)) < 0.9 * true_error(lazy, around_fora.schedule, range(5, 7))


def test_swaps_keep_the_budget_and_help_on_other_noise(lazy: LazyModule) -> None:
    drawn = CacheSchedule.random(0.5, STEPS, BRANCHES, seed=3)
    response = measure_response(lazy, sample, drawn, seed=0, directions=16)
    cost = np.array([1.0, 2.0, 1.0, 2.0])
    spend = float((drawn.should_compute * cost).sum())
    better = swap(response, drawn, cost, spend, swaps=3)
    assert 0 < (better.should_compute != drawn.should_compute).sum() <= 6
    assert (better.should_compute * cost).sum() <= spend
    assert predicted_error(response, better) < predicted_error(response, drawn)
    assert true_error(lazy, better, range(5, 7)) < 0.9 * true_error(lazy, drawn, range(5, 7))
    assert swap(response, drawn, cost, spend, swaps=0) == CacheSchedule(
        drawn.should_compute, np.ones((STEPS, BRANCHES))
    )


def test_what_is_dropped_for_a_budget_is_missed_least_for_its_cost(lazy: LazyModule, around_fora: Response) -> None:
    before, cost = around_fora.schedule.should_compute, np.array([1.0, 3.0, 1.0, 3.0])
    spend = float((before * cost).sum()) - 3.0
    trimmed = trim(around_fora, cost, spend)
    assert spend - 3.0 < (trimmed.should_compute * cost).sum() <= spend
    assert not (trimmed.should_compute & ~before).any()
    harm = harm_of_reuse(around_fora) / cost
    harm[~before] = np.inf
    harm[0] = np.inf
    step, branch = np.unravel_index(int(harm.argmin()), harm.shape)
    assert not trimmed.should_compute[step, branch]
    dropped = [turned_over(around_fora.schedule, (step, branch)) for step, branch in np.argwhere(before) if step]
    worst = max(true_error(lazy, schedule, range(5, 7)) for schedule in dropped)
    assert true_error(lazy, CacheSchedule(trimmed.should_compute), range(5, 7)) < worst


def test_what_costs_nothing_is_not_dropped(around_fora: Response) -> None:
    before, cost = around_fora.schedule.should_compute, np.array([0.0, 1.0, 0.0, 1.0])
    trimmed = trim(around_fora, cost, float((before * cost).sum()) - 2.0).should_compute
    assert np.array_equal(trimmed[:, ::2], before[:, ::2])
    assert before[:, 1::2].sum() - trimmed[:, 1::2].sum() == 2


def test_what_is_dropped_is_dropped_by_all_that_decide_together(around_fora: Response) -> None:
    cost = np.ones(BRANCHES)
    trimmed = trim(around_fora, cost, float(around_fora.schedule.should_compute.sum()) - 1, leaders=[0, 0, 2, 2])
    table = trimmed.should_compute
    assert np.array_equal(table[:, 0], table[:, 1])
    assert np.array_equal(table[:, 2], table[:, 3])
    assert table.sum() == around_fora.schedule.should_compute.sum() - 2


def test_steps_that_must_be_computed_are_not_dropped(around_fora: Response) -> None:
    only_first = trim(around_fora, np.ones(BRANCHES), float(BRANCHES))
    assert only_first.should_compute.sum() == BRANCHES
    with pytest.raises(ConfigError, match="this budget cannot be met, since the first steps compute everything"):
        trim(around_fora, np.ones(BRANCHES), float(BRANCHES), warmup_steps=2)


def test_branches_that_decide_together_are_exchanged_together(lazy: LazyModule) -> None:
    table = np.repeat((np.arange(STEPS) < STEPS // 2)[:, None], BRANCHES, axis=1)
    schedule = CacheSchedule(table, np.random.default_rng(0).uniform(0.5, 1.0, table.shape))
    response = measure_response(lazy, sample, schedule, seed=0, directions=16)
    better = swap(response, schedule, np.ones(BRANCHES), float(table.sum()), swaps=2, leaders=[0] * BRANCHES)
    assert (better.should_compute == better.should_compute[:, :1]).all()
    assert (better.should_compute != table).any()
    assert np.array_equal(better.slopes, schedule.slopes)  # each keeps its own
    assert predicted_error(response, better) < predicted_error(response, schedule)


def test_measurements_of_several_rounds_are_seen_from_one_schedule(lazy: LazyModule, around_fora: Response) -> None:
    near = turned_over(around_fora.schedule, (3, 1))
    moved = around_another(around_fora, near)
    assert predicted_error(moved, near) == pytest.approx(predicted_error(around_fora, near))
    joined = Response.joined([moved, measure_response(lazy, sample, near, seed=1)])
    assert len(joined.error) == len(joined.weights) == len(around_fora.error) + 4
    assert np.array_equal(joined.error[: len(moved.error)], moved.error)


def test_samples_that_went_elsewhere_count_less() -> None:
    assert cauchy_weights(np.array([1.0, 1.0, 9.0])).tolist() == [0.5, 0.5, 0.1]
    assert cauchy_weights(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_nothing_of_a_trajectory_stays_in_memory(lazy: LazyModule) -> None:
    def tensors_after_measuring() -> int:
        measure_response(lazy, sample, CacheSchedule.every(2, STEPS, BRANCHES), seed=0)
        gc.collect()
        return sum(type(item) is Tensor for item in gc.get_objects())

    assert tensors_after_measuring() == tensors_after_measuring()


def test_money_that_is_left_is_spent(lazy: LazyModule, around_fora: Response) -> None:
    cost = np.ones(BRANCHES)
    spend = float(around_fora.schedule.should_compute.sum()) + 2
    assert swap(around_fora, around_fora.schedule, cost, spend, swaps=4).should_compute.sum() == spend


def test_samples_that_cannot_be_told_apart_are_taken_together(lazy: LazyModule) -> None:
    def reversed_rows(denoiser: Callable[..., Tensor], seed: int) -> Tensor:
        return sample(denoiser, seed).flip(0)

    schedule = CacheSchedule.every(2, STEPS, BRANCHES)
    response = measure_response(lazy, reversed_rows, schedule, seed=0, directions=3)
    assert response.directional_derivatives.shape[0] == 3
    assert response.size == start(0).numel()


def test_a_sampler_without_gradient_is_refused(lazy: LazyModule) -> None:
    with pytest.raises(NoGradientError, match="the samples carry no gradient"):
        measure_response(
            lazy, lambda denoiser, seed: sample(denoiser, seed).detach(), CacheSchedule.every(2, STEPS, BRANCHES),
            seed=0, directions=1,
        )  # fmt: skip
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("reuse", slow_but(["linear"], ["linear", "last"]))
def test_effects_of_single_reuses_follow_from_the_answer_of_a_dense_trajectory(reuse: str) -> None:
    lazy = lazy_tiny_dit(reuse=reuse)
    response = measure_response(lazy, sample, CacheSchedule.always_compute(STEPS, BRANCHES), seed=0, directions=48)
    assert not response.error.any()
    foreseen, measured = response.of_single_reuses(), measure_effects(lazy, sample, seed=0).final
    assert np.isnan(foreseen[0]).all()
    np.testing.assert_allclose(foreseen[1:], measured[1:], rtol=0.5)
    assert np.log(foreseen[1:] / measured[1:]).mean() == pytest.approx(0.0, abs=0.1)


def test_whether_rows_are_samples_is_found_once_for_a_graph(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    search = ScheduleSearch(lazy, sample, np.ones(BRANCHES), 12.0, SearchOptions())
    asked, find = [], Trace.rows_are_samples
    monkeypatch.setattr(Trace, "rows_are_samples", lambda trace, samples: asked.append(1) or find(trace, samples))
    schedule = CacheSchedule.every(2, STEPS, BRANCHES)
    first, second = search.measure(schedule, 0), search.measure(schedule, 1)
    assert len(first.error) == len(second.error) == 4
    assert len(asked) == 1
    fresh = measure_response(lazy, sample, schedule, seed=1)
    assert np.array_equal(second.directional_derivatives, fresh.directional_derivatives)
    assert np.array_equal(second.error, fresh.error)


def test_that_is_found_by_going_back_through_one_call(lazy: LazyModule, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, find = [0, 0], Trace.rows_are_samples
    compute = LazyBranch.compute

    def counted(branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        computed[0] += 1
        return compute(branch, inputs)

    def finding(trace: Trace, samples: Tensor) -> bool:
        before = computed[0]
        found = find(trace, samples)
        computed[1] += computed[0] - before
        return found

    monkeypatch.setattr(LazyBranch, "compute", counted)
    monkeypatch.setattr(Trace, "rows_are_samples", finding)
    measure_response(lazy, sample, CacheSchedule.every(2, STEPS, BRANCHES), seed=0)
    assert computed[1] <= BRANCHES


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_model_reuses_as_the_runtime_does(lazy: LazyModule, order: int) -> None:
    draw, steps, branch = np.random.default_rng(order), 10, lazy.branches[0]
    column, slopes = np.append(True, draw.random(steps - 1) < 0.5), draw.uniform(0, 1.5, steps)
    outputs = torch.randn(steps, 1, 5, generator=torch.Generator().manual_seed(order))
    weights = _weights(column, slopes, order)
    slot = CacheSlot.first((outputs[0],), np.array([0]))
    for step in range(1, steps):
        expected = sum(weights[step, age] * outputs[step - age] for age in range(step + 1))
        if column[step]:
            slot = slot.renewed((outputs[step],), np.array([step]), order, np.array([True]), None)
            seen = outputs[step]
        else:
            (seen,) = slot.extrapolated(np.array([step]), slopes[[step]], branch)
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4, check_dtype=False)
