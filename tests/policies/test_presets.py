"""Presets act at once: on any model, with any number of branches and steps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lazy_compile
from lazy_compile import AlwaysCompute, CacheSchedule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.policies.presets import PRESETS, EveryNth, as_policy
from support.diffusers_pipelines import CASES
from support.layers import MLP, norm
from support.small_model import SMALL, Small, fresh, reused, run
from support.toy_models import call, trajectory


def computes(policy: EveryNth, steps: int) -> str:
    return "".join("#" if policy.decisions(step, 0.0, None, {}) else "." for step in range(steps))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (EveryNth(1, 2), "#.#.#.#.#."),
        (EveryNth(4, 3), "####..#..#..#..#..#."),
        (EveryNth(3, 1), "######"),
        (PRESETS["quality"], "########.#.#.#.#.#.#"),
        (PRESETS["fast"], "####"),
    ],
)
def test_the_first_calls_compute_and_then_every_nth(policy: EveryNth, expected: str) -> None:
    assert computes(policy, len(expected)) == expected


@pytest.mark.parametrize(("name", "share"), [("quality", 0.7), ("balanced", 0.6), ("fast", 0.45)])
def test_a_preset_spends_what_it_says_at_20_steps(name: str, share: float) -> None:
    policy = PRESETS[name]
    assert isinstance(policy, EveryNth)
    assert computes(policy, 20).count("#") / 20 == share


@pytest.mark.parametrize("values", [(0, 2), (4, 0), (4, 2.0), (True, 2)])
def test_numbers_that_are_none_of_calls_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(warmup|interval) is .*; expected a number of calls, 1 or more"):
        EveryNth(*values)


def test_a_schedule_and_a_name_stand_for_a_policy() -> None:
    schedule = CacheSchedule.every(2, 4, 2)
    assert as_policy(schedule) == Scheduled(schedule)
    assert as_policy("fast") == PRESETS["fast"]
    with pytest.raises(ConfigError) as caught:
        as_policy("fastest")
    assert str(caught.value) == (
        "policy is 'fastest'; expected one of 'quality', 'balanced', 'fast', a CacheSchedule, or a Policy such as "
        "Scheduled(schedule) or Learned(table)"
    )


def test_transform_takes_a_policy_and_it_acts_from_the_first_trajectory_on() -> None:
    lazy = lazy_compile.transform(SMALL.model(), policy="fast")
    run(lazy, trajectory(SMALL, steps=8))
    assert reused(lazy) == [[0, 0]] * 4 + [[1, 1]] * 2 + [[0, 0]] + [[1, 1]]


def test_a_policy_may_be_set_before_the_model_is_captured_and_is_checked_then() -> None:
    late = lazy_compile.transform(SMALL.model())
    late.policy = CacheSchedule.every(2, 5, branches=3)
    with pytest.raises(ConfigError, match="the schedule has 3 branches, the model has 2"):
        late(**call(SMALL))
    late.policy = CacheSchedule.every(2, 5, branches=2)
    run(late, trajectory(SMALL, steps=3))
    assert reused(late) == [[0, 0], [1, 1], [0, 0]]


def test_a_policy_of_another_model_is_refused_by_transform() -> None:
    with pytest.raises(ConfigError, match="the schedule has 3 branches, the model has 2"):
        lazy_compile.transform(SMALL.model(), call(SMALL), policy=CacheSchedule.every(2, 5, branches=3))


def test_it_says_what_it_will_do(caplog: pytest.LogCaptureFixture) -> None:
    lazy = fresh()
    with caplog.at_level(logging.INFO, "lazy_compile"):
        lazy.policy = "quality"
    assert caplog.messages == [
        "Small: the first 8 calls of a trajectory compute, then one call in 2; the others reuse all branches"
    ]


class GrowsDeeper(Small):
    """Calls with ``deep`` run a further branch, which the first graph does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.last = MLP()

    def forward(self, x: Tensor, t: Tensor, deep: bool = False) -> Tensor:
        h = super().forward(x, t)
        return h + self.last(norm(h)) if deep else h


def test_calls_with_other_branches_follow_a_preset_too() -> None:
    lazy = lazy_compile.transform(GrowsDeeper().eval(), call(SMALL), policy=EveryNth(1, 2))
    run(lazy, [{**arguments, "deep": True} for arguments in trajectory(SMALL, steps=4)])
    assert reused(lazy) == [[0] * 3, [1] * 3, [0] * 3, [1] * 3]


def test_denoisers_of_a_pipeline_follow_it() -> None:
    case = CASES["dit"]()
    lazy_compile.transform(case.pipe, policy=EveryNth(1, 2))
    case.sample(num_inference_steps=4)
    assert case.model.stats.lazy_ratio == 0.5


def test_a_preset_that_never_reuses_equals_the_original() -> None:
    model = SMALL.model()
    dense, lazy = model, lazy_compile.transform(model, policy=EveryNth(1, 1))
    calls = trajectory(SMALL, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(run(dense, calls), run(lazy, calls), strict=True))
    assert AlwaysCompute().decisions(0, 0.0, None, {}) is True
