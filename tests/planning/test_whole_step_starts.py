"""Whole steps that a search begins with."""

from __future__ import annotations

import numpy as np
import pytest

from lazy_compile.planning.whole_step_starts import RULES, fitting, rules


def chosen(steps: int, count: int, warmup_steps: int = 1) -> list[tuple[int, ...]]:
    found = [fitting(rule, count, warmup_steps) for rule in rules(steps, np.ones(steps - 1))]
    return [tuple(np.flatnonzero(each).tolist()) for each in found if each is not None]


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 50])
def test_no_rule_computes_more_than_it_may_and_all_begin_with_a_step(steps: int) -> None:
    for count in range(1, steps + 1):
        found = chosen(steps, count)
        assert 0 < len(found) <= RULES
        assert all(places[0] == 0 and len(places) <= count for places in found)
        assert max(map(len, found)) == count


def test_the_steps_of_taylorseer_are_among_them() -> None:
    # diffusers: a warm-up of 8, then every 2nd; of 4, then every 3rd, the first of them one step early
    assert (*range(8), 9, 11, 13, 15, 17, 19) in chosen(20, 14)
    assert (0, 1, 2, 3, 5, 8, 11, 14, 17) in chosen(20, 9)
    assert (0, 1, 2, 3, 6, 9, 12, 15, 18) in chosen(20, 9)


def test_the_warm_up_of_the_model_is_kept() -> None:
    assert all(places[:5] == (0, 1, 2, 3, 4) for places in chosen(20, 9, warmup_steps=5))
    assert chosen(20, 4, warmup_steps=5) == []


@pytest.mark.parametrize("change", [np.zeros(19), np.full(19, np.inf), np.full(19, np.nan)])
def test_changes_that_say_nothing_spread_steps_evenly(change: np.ndarray) -> None:
    found = [fitting(rule, 5, 1) for rule in rules(20, change)]
    assert {int(each.sum()) for each in found[:4] if each is not None} == {5}
