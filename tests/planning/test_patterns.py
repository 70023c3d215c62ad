"""Schedules of few distinct rows."""

from __future__ import annotations

import numpy as np
import pytest

from lazy_compile import CacheSchedule
from lazy_compile.errors import ConfigError
from lazy_compile.planning.import_schedule import freeze
from lazy_compile.planning.patterns import few_patterns, pattern_count
from lazy_compile.runtime.stats import LazyStats

STEPS, BRANCHES = 16, 7
SCHEDULE = CacheSchedule(
    CacheSchedule.random(0.5, STEPS, BRANCHES, seed=1).should_compute,
    np.random.default_rng(0).uniform(size=(STEPS, BRANCHES)),
)
COST = np.array([3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 2.0])


@pytest.mark.parametrize("count", [2, 3, 5, 8, 99])
def test_at_most_so_many_rows_at_no_more_cost(count: int) -> None:
    found = few_patterns(SCHEDULE, count, COST)
    assert pattern_count(found) <= count
    assert (found.should_compute @ COST).sum() <= (SCHEDULE.should_compute @ COST).sum() + 1e-9
    assert found.should_compute[0].all()
    assert np.array_equal(found.slopes, SCHEDULE.slopes)
    if count == 99:
        assert found == SCHEDULE


def test_more_patterns_change_less() -> None:
    changes = [
        (few_patterns(SCHEDULE, count).should_compute != SCHEDULE.should_compute).sum() for count in range(2, 16)
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > changes[5] > 0


def test_rows_that_are_alike_are_joined_and_whole_steps_stay() -> None:
    rows = [[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 1, 1]]
    found = few_patterns(CacheSchedule(np.array(rows, dtype=bool)), 3).should_compute.astype(int).tolist()
    assert found == [*rows[:5], rows[1], rows[6]]


def test_branches_that_share_a_decision_go_on_to_do_so() -> None:
    leaders = [0, 0, 2, 2, 4, 4, 4]
    found = few_patterns(SCHEDULE.tied(leaders), 3, COST, leaders)
    assert found == found.tied(leaders)
    assert pattern_count(found) <= 3


def test_one_pattern_is_refused_unless_everything_computes() -> None:
    with pytest.raises(ConfigError, match="ask for 2 or more"):
        few_patterns(SCHEDULE, 1)
    dense = CacheSchedule.always_compute(4, 3)
    assert few_patterns(dense, 1) == dense


def test_what_gates_decided_is_frozen_into_few_patterns() -> None:
    stats = LazyStats(COST, 20)
    for step, row in enumerate(SCHEDULE.should_compute):
        stats.record_step(step, row, np.ones(BRANCHES))
    assert np.array_equal(freeze(stats).should_compute, SCHEDULE.should_compute)
    assert pattern_count(freeze(stats, max_patterns=4)) <= 4
