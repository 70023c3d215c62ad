"""The simple rules of the literature that calibrated models are held against."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, LazyModule, Policy, Scheduled
from lazy_compile.planning.baselines import (
    AccumulatedChange,
    FirstBlockChange,
    measure_changes,
    relative_change,
    smoothcache_schedule,
    taylor_samples,
)
from support.sampling import STEPS, lazy_tiny_dit, sample


def reuse_under(lazy: LazyModule, policy: Policy) -> np.ndarray:
    lazy.policy = policy
    sample(lazy, 0)
    return lazy.stats.reuse_table


def test_taylorseer_of_first_order_is_linear_reuse() -> None:
    lazy = lazy_tiny_dit()
    schedule = CacheSchedule.every(2, STEPS, 4)
    lazy.policy = Scheduled(schedule)
    torch.testing.assert_close(taylor_samples(lazy, sample, schedule, 1, seed=0), sample(lazy, 0))
    second = taylor_samples(lazy, sample, schedule, 2, seed=0)
    assert not torch.allclose(second, sample(lazy, 0), atol=1e-5)


def test_smoothcache_reuses_while_the_output_is_near_the_cached_one() -> None:
    changes = np.array([[[np.inf], [np.inf]], [[0.1], [np.inf]], [[0.1], [0.3]], [[0.1], [0.15]]])
    assert smoothcache_schedule(changes, 0.2).should_compute[:, 0].tolist() == [True, False, True, False]
    assert smoothcache_schedule(changes, 0.4).should_compute[:, 0].tolist() == [True, False, False, True]
    assert smoothcache_schedule(changes, 0.05).should_compute.all()


def test_changes_are_those_of_the_dense_trajectory() -> None:
    lazy = lazy_tiny_dit()
    changes = measure_changes(lazy, sample, seed=0, max_age=2)
    assert changes.shape == (STEPS, 2, 4)
    assert np.isinf(changes[0]).all()
    assert np.isinf(changes[1, 1]).all()
    assert (changes[2:] > 0).all()
    assert (changes[2:] < 5).all()
    assert relative_change(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("rule", [AccumulatedChange, FirstBlockChange])
def test_a_rule_decides_for_whole_steps_and_reuses_more_with_a_larger_threshold(
    rule: type[AccumulatedChange] | type[FirstBlockChange],
) -> None:
    lazy = lazy_tiny_dit()
    kept = 2 if rule is FirstBlockChange else 0
    tables = [reuse_under(lazy, rule(threshold)) for threshold in (0.0, 0.1, 1e9)]
    for table in tables:
        assert (table[:, kept:] == table[:, kept : kept + 1]).all()
        assert not table[:, :kept].any()
    shares = [table[:, kept].mean() for table in tables]
    assert shares[0] == 0.0
    assert shares[0] <= shares[1] <= shares[2] == (STEPS - 1) / STEPS


def test_changes_add_up_until_the_threshold() -> None:
    lazy = lazy_tiny_dit()
    single = max(relative_changes(lazy))
    table = reuse_under(lazy, AccumulatedChange(1.5 * single))
    assert table[1, 0] == 1.0
    assert 0 < table[:, 0].sum() < STEPS - 1


def relative_changes(lazy: LazyModule) -> list[float]:
    """Of the first branch's input, from step to step of a trajectory in which everything is reused."""
    seen: list[torch.Tensor] = []

    class Watch(Policy):
        def should_compute(self, query: object) -> bool:
            if query.branch.index == 0:  # type: ignore[attr-defined]
                seen.append(query.entries[0])  # type: ignore[attr-defined]
            return False

        observe = should_compute  # type: ignore[assignment]

    reuse_under(lazy, Watch())
    return [relative_change(now, before) for before, now in itertools.pairwise(seen)]
