"""Branches under one gate: which they are, and that in PyTorch they do as the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lazy_compile import CacheSchedule, LazyConfig, LazyModule, Learned, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import BranchKind
from lazy_compile.policies.gate_layout import GateLayout, leaders_of
from lazy_compile.policies.policy import GateQuery
from support.branches import branch
from support.lowering import knots, random_gates
from support.oracle import Oracle
from support.toy_models import TOYS, trajectory

Compiled = Callable[..., LazyModule]
STEPS = 8
SELF, CROSS, JOINT = BranchKind.SELF_ATTENTION, BranchKind.CROSS_ATTENTION, BranchKind.JOINT_ATTENTION
MLP, PARALLEL, CONV = BranchKind.MLP, BranchKind.PARALLEL, BranchKind.CONV


@pytest.mark.parametrize(
    ("kinds", "group", "leaders"),
    [
        ([SELF, MLP, SELF, MLP], 1, (0, 1, 2, 3)),
        ([SELF, MLP, SELF, MLP, SELF], 2, (0, 0, 2, 2, 4)),
        ([SELF, MLP, SELF, MLP], 9, (0, 0, 0, 0)),
        ([SELF, MLP, SELF, MLP], "block", (0, 0, 2, 2)),
        ([SELF, CROSS, MLP, SELF, CROSS, MLP], "block", (0, 0, 0, 3, 3, 3)),
        ([JOINT, MLP, MLP, JOINT, MLP, PARALLEL, PARALLEL, SELF, MLP], "block", (0, 0, 0, 3, 3, 5, 6, 7, 7)),
        ([MLP, SELF, MLP, CONV, MLP], "block", (0, 1, 1, 3, 4)),
    ],
)
def test_who_leads(kinds: list[BranchKind], group: int | str, leaders: tuple[int, ...]) -> None:
    branches = [replace(branch(index), kind=kind) for index, kind in enumerate(kinds)]
    assert leaders_of(branches, group) == leaders


def test_the_first_to_run_leads_whatever_its_index() -> None:
    assert leaders_of([branch(2), branch(0), branch(1)], 2) == (2, 1, 2)


def test_gates_and_their_weights() -> None:
    layout = GateLayout.of([branch(0, 2), branch(1, 3), branch(2, 5)], (0, 0, 2))
    assert (layout.gates, layout.width) == ((0, 2), 7)
    assert [layout.gate_of(index) for index in range(3)] == [0, 0, 1]
    assert (layout.weights_of(0), layout.weights_of(2)) == (slice(0, 2), slice(2, 7))
    assert GateLayout.of([branch(0), branch(1)]).gates == (0, 1)


@pytest.mark.parametrize("group", [0, -1, 1.5, True, "blocks", None])
def test_a_group_is_a_number_or_a_block(group: object) -> None:
    with pytest.raises(
        ConfigError, match=r"group is .*; expected the number of branches that share a gate, or 'block'"
    ):
        LazyConfig(group=group)


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("group", [2, 3, "block"])
def test_a_group_follows_its_first_branch(compiled: Compiled, group: int | str, reuse: str) -> None:
    toy = TOYS["cross"]
    lazy = compiled("cross", reuse=reuse, group=group)
    schedule = CacheSchedule.random(0.5, STEPS, len(lazy.branches), seed=3)
    lazy.policy = Scheduled(schedule)
    leaders = list(lazy.graph.leaders(group))
    tied = schedule.should_compute[:, leaders]
    assert not np.array_equal(tied, schedule.should_compute)
    assert schedule.tied(leaders) == CacheSchedule(tied)
    calls = trajectory(toy, steps=STEPS)
    with torch.no_grad():
        seen = [lazy(**arguments) for arguments in calls]
    assert_close(seen, Oracle(lazy.original, toy.modules, tied, reuse).run(calls), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(lazy.stats.reuse_table, ~tied)


def test_rows_of_a_group_decide_one_by_one(compiled: Compiled) -> None:
    lazy = compiled("dit", group=2)
    lazy.policy = Learned(random_gates(lazy, knots(STEPS)))
    for arguments in trajectory(TOYS["dit"], batch=4, steps=STEPS):
        lazy(**arguments)
    table = lazy.stats.reuse_table
    np.testing.assert_array_equal(table[:, 0], table[:, 1])
    assert ((table > 0) & (table < 1)).any()


def test_a_branch_that_decides_once_computes_if_any_row_of_its_leader_does(compiled: Compiled) -> None:
    lazy = compiled("windowed", group=2)
    assert [item.row_separable for item in lazy.branches] == [False, True]
    lazy.policy = Learned(random_gates(lazy, knots(STEPS)))
    for arguments in trajectory(TOYS["windowed"], batch=3, steps=STEPS):
        lazy(**arguments)
    np.testing.assert_array_equal(lazy.stats.reuse_table[:, 0], lazy.stats.reuse_table[:, 1])
    assert 0 < lazy.stats.lazy_ratio < 1


@pytest.mark.parametrize("options", [{"warmup_steps": 3}, {"max_reuse_age": 2}])
def test_limits_hold_for_groups(compiled: Compiled, options: dict[str, int]) -> None:
    lazy = compiled("dit", group=2, **options)
    lazy.policy = Scheduled(CacheSchedule.every(STEPS, STEPS, 4))
    for arguments in trajectory(TOYS["dit"], steps=STEPS):
        lazy(**arguments)
    computed = np.flatnonzero(lazy.stats.reuse_table[:, 1] == 0).tolist()
    assert computed == ([0, 1, 2] if "warmup_steps" in options else [0, 3, 6])


class Watch(Learned):
    """Notes for every step what its gates say at once."""

    def should_compute(self, query: GateQuery) -> torch.Tensor:
        self.observe(query)
        return super().should_compute(query)

    def observe(self, query: GateQuery) -> None:
        now = bool(Learned(self.table).should_compute(query).any())
        SAID.setdefault(query.step, {})[query.branch.index] = now
        if query.step == 0:
            super().observe(query)


SAID: dict[int, dict[int, bool]] = {}


def test_delayed_gates_decide_by_the_logits_of_the_step_before(compiled: Compiled) -> None:
    lazy = compiled("dit", batch_rule="all_reuse")
    lazy.policy = Watch(random_gates(lazy, knots(STEPS)), delayed=True)
    SAID.clear()
    for arguments in trajectory(TOYS["dit"], steps=STEPS):
        lazy(**arguments)
    for step in range(1, STEPS):
        assert (lazy.stats.reuse_table[step] == 0).tolist() == [SAID[step - 1][index] for index in range(4)]
    assert 0.1 < lazy.stats.lazy_ratio < 0.9
