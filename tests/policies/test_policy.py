from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lazy_compile import AlwaysCompute, CacheSchedule, GateTable, Learned, Policy, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.policies.learned import split_row
from lazy_compile.policies.policy import GateQuery
from support.branches import branch

BRANCHES = (branch(0), branch(1, 3))


def query(index: int, step: int = 0, timestep: float = 0.0, scale: float = 1.0) -> GateQuery:
    entry = torch.ones(3, 4, BRANCHES[index].gate_features) * torch.tensor([0.0, 1.0, -1.0])[:, None, None]
    return GateQuery(BRANCHES[index], [scale * entry], step, timestep, None, {})


def learned(shift: float = 0.0) -> Learned:
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    bias = torch.tensor([[-1.0, 5.0], [2.0, -2.0]])
    return Learned(GateTable((2, 3), torch.tensor([1000.0, 0.0]), weight, bias), shift)


def test_always_compute_computes() -> None:
    assert AlwaysCompute().should_compute(query(0)) is True


def test_a_schedule_is_followed_by_step_and_branch() -> None:
    table = np.array([[1, 1], [0, 1], [1, 0]], dtype=bool)
    policy = Scheduled(CacheSchedule(table))
    assert [[policy.should_compute(query(index, step)) for index in (0, 1)] for step in range(3)] == table.tolist()


def test_steps_behind_the_end_of_a_schedule_compute() -> None:
    policy = Scheduled(CacheSchedule.every(9, 3, 2))
    assert policy.should_compute(query(0, step=2)) is False
    assert policy.should_compute(query(0, step=3)) is True


def test_gates_are_those_of_the_branch_and_of_the_time() -> None:
    policy = learned()
    # rows read 0, 1 and -1 in every channel
    assert policy.should_compute(query(0, timestep=1000.0)).tolist() == [False, True, False]  # -1, 1, -3
    assert policy.should_compute(query(1, timestep=1000.0)).tolist() == [True, True, True]  # 5
    assert policy.should_compute(query(0, timestep=0.0)).tolist() == [True, True, True]  # 2
    assert policy.should_compute(query(1, timestep=0.0)).tolist() == [False, True, False]  # -2, 1, -5


def test_a_shift_is_added_to_every_logit() -> None:
    assert learned(shift=1.5).should_compute(query(0, timestep=1000.0)).tolist() == [True, True, False]
    assert learned(shift=-10).should_compute(query(1, timestep=1000.0)).tolist() == [False, False, False]


def test_what_is_not_a_number_computes() -> None:
    assert learned().should_compute(query(0, timestep=1000.0, scale=math.nan)).tolist() == [True, True, True]


def test_rows_are_looked_up_once_for_each_time_and_not_without_end() -> None:
    policy = learned()
    first = policy._gates(3.0, None, torch.device("cpu"))
    assert policy._gates(3.0, None, torch.device("cpu")) is first
    for timestep in range(5000):
        policy.should_compute(query(0, timestep=timestep / 5))
    assert len(policy._rows) <= 4096


def test_policies_are_equal_whatever_they_looked_up() -> None:
    policy = learned()
    same = Learned(policy.table, policy.shift)
    policy.should_compute(query(0, timestep=3.0))
    assert policy == same


def test_a_row_is_split_among_the_branches() -> None:
    (first, bias), (second, last) = split_row(learned().table.row(0.0), (2, 3), torch.device("cpu"))
    assert (first.tolist(), second.tolist()) == ([0.0, 0.0], [1.0, 1.0, 1.0])
    assert (float(bias), float(last)) == (2.0, -2.0)


def test_a_policy_of_another_model_is_refused() -> None:
    Scheduled(CacheSchedule.every(2, 4, 2)).check(BRANCHES)
    learned().check(BRANCHES)
    AlwaysCompute().check(BRANCHES)
    with pytest.raises(ConfigError) as caught:
        Scheduled(CacheSchedule.every(2, 4, 3)).check(BRANCHES)
    assert str(caught.value) == "the schedule has 3 branches, the model has 2; plan a schedule for this model"
    with pytest.raises(ConfigError) as caught:
        learned().check(BRANCHES[:1])
    assert str(caught.value) == (
        "the gate table is for 2 branches with 5 features, the model has 1 with 2; calibrate gates for this model"
    )


def test_gates_with_the_right_sum_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate gates for this model"):
        learned().check(BRANCHES[::-1])


def test_a_policy_of_ones_own_needs_one_method() -> None:
    class Alternates(Policy):
        def should_compute(self, query: GateQuery) -> bool:
            query.memory["calls"] = int(query.memory.get("calls", 0)) + 1
            return query.step % 2 == 0

    policy, asked = Alternates(), query(0, step=1)
    policy.check(BRANCHES)
    assert policy.should_compute(asked) is False
    assert asked.memory == {"calls": 1}
