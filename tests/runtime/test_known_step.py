"""Decisions that are known before a step are not asked for at the branches, and change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lazy_compile import CacheSchedule, LazyModule, Policy, Scheduled
from lazy_compile.policies.policy import GateQuery
from lazy_compile.runtime import module as runtime
from lazy_compile.runtime.known_step import KnownStep
from support.small_model import SMALL, STEPS, fresh, reused, run, same
from support.toy_models import trajectory

TABLE = np.array([[1, 1], [1, 1], [0, 1], [0, 0], [1, 0], [0, 0]], dtype=bool)
SLOPES = np.array([[1, 1], [1, 1], [0.5, 1], [0.0, 2.0], [1, 0.7], [1.5, 1]])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What each call ran on."""
    seen: list[Any] = []
    choose = LazyModule._step

    def note(self: LazyModule, *args: Any) -> Any:
        seen.append(choose(self, *args))
        return seen[-1]

    monkeypatch.setattr(LazyModule, "_step", note)
    return seen


captured = cache(fresh)
"""One model for each set of options."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reuse": "last"},
        {"reuse": "taylor"},
        {"granularity": "block"},
        {"group": 2},
        {"max_reuse_age": 1},
        {"warmup_steps": 3},
    ],
)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["as they are", "with slopes"])
def test_it_does_what_branches_that_are_asked_do(
    options: dict[str, Any], slopes: Any, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, calls = captured(**options), trajectory(SMALL, steps=STEPS)
    branches = len(lazy.branches)
    lazy.policy = Scheduled(CacheSchedule(TABLE[:, :branches], None if slopes is None else slopes[:, :branches]))
    lazy.reset()
    lazy.reset_stats()
    seen, table = run(lazy, calls), reused(lazy)
    assert {type(step) for step in steps} == {KnownStep}
    monkeypatch.setattr(runtime, "known_step", lambda *args: None)
    lazy.reset()
    lazy.reset_stats()
    assert same(run(lazy, calls), seen)
    assert reused(lazy) == table
    assert any(map(any, table))


def test_rows_at_different_steps_are_asked_one_by_one(steps: list[Any]) -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.policy = Scheduled(CacheSchedule(TABLE))
    expected = run(lazy, calls)
    lazy.reset()
    first = [{name: value[:1] for name, value in call.items()} for call in calls]
    second = [{name: value[1:] for name, value in call.items()} for call in calls]
    (alone,) = run(lazy, first[:1])
    steps.clear()
    outputs = [alone[0]]
    for one, other in zip(first[1:], second, strict=False):
        (pair,) = run(lazy, [{name: torch.cat([one[name], other[name]]) for name in one}])
        outputs.append(pair[0])
    assert KnownStep not in map(type, steps)
    for seen, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(seen, wanted[0], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Counts(Policy):
    """Knows before a step, and may be asked for it once."""

    asked: list[int]

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        self.asked.append(step)
        return step % 2 == 0


class Looks(Counts):
    """Looks at the activations all the same."""

    def should_compute(self, query: GateQuery) -> bool:
        return bool(query.entries[0].mean() > -np.inf)


def test_a_rule_is_asked_once_a_step_and_one_that_looks_at_every_branch(steps: list[Any]) -> None:
    lazy, calls = fresh(), trajectory(SMALL, steps=STEPS)
    lazy.policy = counts = Counts([])
    run(lazy, calls)
    assert counts.asked == list(range(STEPS))
    assert reused(lazy) == [[float(step % 2)] * 2 for step in range(STEPS)]
    steps.clear()
    lazy.policy = Looks([])
    run(lazy, calls)
    assert KnownStep not in map(type, steps)


def test_other_sizes_are_asked_anew(steps: list[Any]) -> None:
    lazy = fresh()
    lazy.policy = Scheduled(CacheSchedule.every(2, STEPS, 2))
    for rows in (1, 2, 1, 2):
        run(lazy, trajectory(SMALL, rows, steps=2))
    assert [type(step) is KnownStep for step in steps] == [True] * 8
