"""Effects of single reuses, and the schedules planned from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, Scheduled, transform
from lazy_compile.errors import ArtifactError, ConfigError
from lazy_compile.planning import search as schedule_search
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.planner import plan
from lazy_compile.planning.reuse_effects import EffectTable, measure_effects
from lazy_compile.planning.sample_response import Response
from lazy_compile.planning.search import ScheduleSearch, SearchOptions, final_error
from lazy_compile.planning.single_reuses import AGE_EXPONENT, plan_reuse
from lazy_compile.planning.step_paths import StepCosts
from lazy_compile.planning.timings import BranchTimings, measure_timings
from lazy_compile.progress import no_progress
from support.sampling import STEPS, lazy_tiny_dit, sample
from support.toy_models import randomize
from support.toy_networks import TinyDiT

QUICK = SearchOptions(rounds=1)


def made_up_effects(steps: int = 5, branches: int = 2, seed: int = 0) -> EffectTable:
    effect = np.random.default_rng(seed).lognormal(size=(steps, branches))
    effect[0] = np.nan
    return EffectTable(effect, effect.copy(), np.arange(steps, 0.0, -1.0), np.array([3.0, 1.0]), 8)


def additive_cost(effects: EffectTable, table: np.ndarray, price: float, cost: np.ndarray) -> float:
    total = 0.0
    for branch in range(table.shape[1]):
        age = 0
        for step in range(table.shape[0]):
            age = 0 if table[step, branch] else age + 1
            total += price * cost[branch] if age == 0 else effects.final[step, branch] * age**AGE_EXPONENT
    return total


def test_an_effect_is_what_reusing_once_does_to_the_final_sample() -> None:
    lazy = lazy_tiny_dit()
    effects = measure_effects(lazy, sample, seed=3)
    dense = sample(lazy, 3)
    for step, branch in ((1, 0), (2, 3), (STEPS - 1, 1)):
        table = np.ones((STEPS, len(lazy.branches)), dtype=bool)
        table[step, branch] = False
        lazy.policy = Scheduled(CacheSchedule(table))
        expected = float((sample(lazy, 3) - dense).double().square().mean())
        assert effects.final[step, branch] == pytest.approx(expected, rel=1e-3)
    assert np.isnan(effects.final[0]).all()
    assert np.isfinite(effects.final[1:]).all()


def test_measuring_leaves_the_policy_and_the_model_as_they_were() -> None:
    lazy = lazy_tiny_dit()
    policy = lazy.policy
    before = {name: value.clone() for name, value in lazy.original.state_dict().items()}
    measure_effects(lazy, sample)
    assert lazy.policy is policy
    assert lazy.cache_bytes == 0
    assert all(torch.equal(value, before[name]) for name, value in lazy.original.state_dict().items())


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_is_the_cheapest_of_all_schedules_at_its_price(seed: int) -> None:
    effects = made_up_effects(seed=seed)
    planned = plan_reuse(effects, Budget(lazy_ratio=0.4))
    cost = np.ones(2)
    best = additive_cost(effects, planned.schedule.should_compute, planned.price, cost)
    for choice in itertools.product([True, False], repeat=8):
        table = np.vstack([np.ones((1, 2), dtype=bool), np.array(choice).reshape(4, 2)])
        assert best <= additive_cost(effects, table, planned.price, cost) + 1e-9


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_a_plan_meets_its_budget_and_saves_little_more(ratio: float) -> None:
    effects = made_up_effects(steps=20)
    by_ratio = plan_reuse(effects, Budget(lazy_ratio=ratio)).schedule
    assert ratio <= by_ratio.lazy_ratio <= ratio + 0.08
    by_compute = plan_reuse(effects, Budget(compute_ratio=1 - ratio / 2)).schedule
    assert by_compute.compute_ratio([3, 1], 8) <= 1 - ratio / 2


def test_the_sign_of_the_margin_is_the_decision() -> None:
    planned = plan_reuse(made_up_effects(), Budget(lazy_ratio=0.3))
    assert np.array_equal(planned.margin >= 0, planned.schedule.should_compute)
    assert np.isinf(planned.margin[0]).all()


def test_a_plan_for_a_model_can_be_followed() -> None:
    lazy = lazy_tiny_dit()
    lazy.policy = Scheduled(plan(lazy, sample, Budget(lazy_ratio=0.3), options=QUICK))
    sample(lazy, 0)
    assert lazy.stats.lazy_ratio == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"lazy_ratio": 0.5, "compute_ratio": 0.5}, "give exactly one"),
        ({}, "give exactly one"),
        ({"lazy_ratio": 1.5}, "between 0 and 1; seen 1.5"),
        ({"error": 0.0}, "above 0; seen 0.0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**budget)


def test_a_model_that_was_not_called_yet_is_captured_by_planning() -> None:
    lazy = transform(randomize(TinyDiT()).eval())
    schedule = plan(lazy, sample, Budget(compute_ratio=0.6), options=QUICK)
    macs = [branch.macs for branch in lazy.branches]
    assert schedule.compute_ratio(macs, lazy.graph.total_macs) <= 0.6


def test_a_latency_budget_counts_seconds() -> None:
    lazy, options = lazy_tiny_dit(), SearchOptions(rounds=1, directions=8)
    timings = BranchTimings(np.array([1.0, 0.0, 0.0, 0.0]), total=2.0)
    schedule = plan(lazy, sample, Budget(latency_ratio=0.7), timings=timings, options=options)
    computed = schedule.should_compute.mean(axis=0)
    assert 0.5 * computed[0] + 0.5 <= 0.7
    assert computed[0] <= computed[1:].mean()  # the others cost nothing
    measured = measure_timings(lazy, sample)
    assert measured.branches.shape == (4,)
    assert measured.branches.min() > 0
    assert measured.branches.sum() < measured.total


class Watched(ScheduleSearch):
    """Notes what was measured around and what was compared; the first of what is compared always wins."""

    def __init__(self, spend: float, rounds: int = 1) -> None:
        lazy = lazy_tiny_dit()
        super().__init__(lazy, sample, np.ones(4), spend, SearchOptions(rounds=rounds, swaps=1))
        self.around: list[CacheSchedule] = []
        self.compared: list[list[CacheSchedule]] = []

    def measure(self, schedule: CacheSchedule, seed: int) -> Response:
        self.around.append(schedule)
        return super().measure(schedule, seed)

    def _judge(self, candidates: Sequence[CacheSchedule], seed: int) -> np.ndarray:
        self.compared.append(list(candidates))
        return np.ones((len(candidates), 1))


def test_every_start_is_given_a_round_and_held_against_the_result() -> None:
    search = Watched(spend=12.0)
    starts = [CacheSchedule.every(2, STEPS, 4), CacheSchedule.random(0.5, STEPS, 4, seed=0)]
    search.run(starts, 0, no_progress)
    assert search.around[:2] == starts
    first, *_, last = search.compared
    assert all(start in first for start in starts)
    assert last[1:] == starts
    whole = [candidate for candidate in first if (candidate.should_compute == candidate.should_compute[:, :1]).all()]
    assert any(
        candidate not in starts and (candidate.should_compute != starts[0].should_compute).any() for candidate in whole
    )
    assert len(first) == 2 + 5 + 3  # of whole steps those that move as such are proposed too


def test_whole_steps_are_placed_early_and_late_and_one_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScheduleSearch, "_step_costs", lambda *_: StepCosts(np.ones((20, 20, 20))))
    monkeypatch.setattr(schedule_search, "trim", lambda response, cost, spend, **_: response)
    search = Watched(spend=7 * 4.0)
    monkeypatch.setattr(search, "measure", lambda schedule, seed: schedule)
    allowed, beyond = search.starts(20, 0)
    steps = [{tuple(np.flatnonzero(each.should_compute[:, 0])) for each in compared} for compared in search.compared]
    assert {(0, 3, 6, 9, 12, 15, 18), (0, 2, 5, 8, 11, 14, 17)} <= steps[0]
    assert (0, 1, 2, 5, 9, 12, 16) in steps[0]  # a warm-up, and others spread over the rest
    assert {(0, 1, 2, 6, 10, 14, 18), (0, 1, 2, 3, 8, 13, 18)} <= steps[0]  # every 4th and 5th step after a warm-up
    assert search.finalists[0] == allowed
    assert len(search.finalists) == 4
    assert [int(schedule.should_compute[:, 0].sum()) for schedule in (allowed, beyond)] == [7, 8]


@pytest.mark.slow
def test_a_budget_of_error_is_kept_and_used_up() -> None:
    lazy, options = lazy_tiny_dit(), SearchOptions(rounds=0)
    allowed = final_error(lazy, sample, CacheSchedule.every(2, STEPS, len(lazy.branches)), seed=5)
    schedule = plan(lazy, sample, Budget(error=allowed), options=options)
    assert final_error(lazy, sample, schedule, seed=5) <= 1.2 * allowed
    assert schedule.lazy_ratio > 0.4
    assert plan(lazy, sample, Budget(error=1e-12), options=options).lazy_ratio == 0.0


def test_timings_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    path.write_text('{"branches": [0.1, 0.2], "total": 0.5}')
    assert BranchTimings.load(path).branches.tolist() == [0.1, 0.2]
    path.write_text('{"branches": [0.1, 0.6], "total": 0.5}')
    with pytest.raises(ArtifactError, match=r"branches of 0.7 s do not fit in a step of 0.5 s"):
        BranchTimings.load(path)
    path.write_text('{"total": 0.5}')
    with pytest.raises(ArtifactError, match="holds no timings"):
        BranchTimings.load(path)


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be met"):
        plan_reuse(made_up_effects(), Budget(lazy_ratio=0.95))


def test_a_sampler_of_one_step_is_refused() -> None:
    lazy = lazy_tiny_dit()
    with pytest.raises(ConfigError, match="at least 2"):
        measure_effects(
            lazy, lambda denoiser, seed: denoiser(torch.randn(2, 3, 8, 8), torch.ones(2), torch.tensor([1, 2]))
        )
