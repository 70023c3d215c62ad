"""When reuse is forbidden, and what is said to have been saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, GateTable, LazyModule, Learned, Scheduled
from lazy_compile.policies.gate_table import FORCE
from support.layers import TOKENS, WIDTH
from support.small_model import ALWAYS, NEVER, SMALL, STEPS, Decides, reused, run
from support.toy_models import TOYS, call, trajectory

Compiled = Callable[..., LazyModule]


# Limits ---------------------------------------------------------------------------------------------------------------


def test_warmup_steps_compute(compiled: Compiled) -> None:
    lazy = compiled("dit", warmup_steps=3)
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=STEPS))
    assert [row[0] for row in reused(lazy)] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("age", "pattern"), [(1, "crcrcrcr"), (2, "crrcrrcr"), (None, "crrrrrrr")])
def test_no_branch_is_reused_longer_than_the_greatest_age(age: int | None, pattern: str, compiled: Compiled) -> None:
    lazy = compiled("dit", max_reuse_age=age)
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=8))
    assert "".join("cr"[int(row[0])] for row in reused(lazy)) == pattern


def test_age_is_counted_for_every_row(compiled: Compiled) -> None:
    lazy = compiled("dit", max_reuse_age=2)
    lazy.policy = Decides(lambda step, branch: [step == 1, False])
    run(lazy, trajectory(TOYS["dit"], steps=5))
    # row 0 computes at 0, 1, 4; row 1 at 0, 3
    assert [row[0] for row in reused(lazy)] == [0.0, 0.5, 1.0, 0.5, 0.5]


def test_a_gate_that_is_not_a_number_computes(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    knots = torch.tensor([float(arguments["t"][0]) for arguments in calls])
    table = GateTable.constant(lazy.branches, knots, bias=-FORCE)
    table.weight[1, 0] = math.nan  # branch 0 at step 1
    lazy.policy = Learned(table)
    run(lazy, calls)
    assert reused(lazy) == [[0.0] * 4, [0.0, 1.0, 1.0, 1.0], [1.0] * 4]


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ("per_sample", [0.25, 0.5, 0.75, 1.0]),
        ("all_reuse", [0.0, 0.0, 0.0, 1.0]),
        ("majority", [0.0, 0.0, 1.0, 1.0]),
        ("any_reuse", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_batch_rule_joins_the_decisions_of_rows(rule: str, shares: list[float], compiled: Compiled) -> None:
    lazy = compiled("dit", batch_rule=rule)
    rows_that_reuse = [1, 2, 3, 4]
    lazy.policy = Decides(lambda step, branch: [row >= rows_that_reuse[branch] for row in range(4)])
    run(lazy, trajectory(TOYS["dit"], 4, steps=2))
    assert reused(lazy) == [[0.0] * 4, shares]


def test_the_shift_of_learned_gates_is_a_dial(compiled: Compiled) -> None:
    lazy = compiled("dit")
    calls = trajectory(TOYS["dit"], steps=3)
    table = GateTable.constant(lazy.branches, torch.tensor([500.0]), bias=0.5)
    for shift, ratio in ((0.0, 0.0), (-1.0, 2 / 3), (1.0, 0.0)):
        lazy.policy = Learned(table, shift=shift)
        lazy.reset_stats()
        run(lazy, calls)
        assert lazy.stats.lazy_ratio == pytest.approx(ratio)


# Accounts -------------------------------------------------------------------------------------------------------------


def test_ratios_are_those_counted_by_hand(shared: LazyModule) -> None:
    attention = TOKENS * 4 * WIDTH * WIDTH + 2 * TOKENS * TOKENS * WIDTH
    mlp = TOKENS * 2 * WIDTH * 2 * WIDTH
    total = attention + mlp
    shared.policy = Decides(lambda step, branch: [branch == 0, step != 2])
    shared.reset_stats()
    run(shared, trajectory(SMALL, steps=3))
    rows = 2
    assert [branch.macs for branch in shared.branches] == [rows * attention, rows * mlp]
    assert shared.stats.total_macs == rows * total
    # step 1: row 0 computes the attention, row 1 both; step 2: row 0 computes the attention, row 1 nothing
    assert reused(shared) == [[0.0, 0.0], [0.0, 0.5], [0.5, 1.0]]
    assert shared.stats.lazy_ratio == pytest.approx((0 + 1 + 1 + 2) / 12)
    saved = (1 * attention + 3 * mlp) / 6
    assert shared.stats.compute_ratio == pytest.approx(1 - saved / total)
    assert shared.stats.decisions_varying_between_samples == pytest.approx(2 / 4)
    assert shared.stats.calls == 3


def test_ratios_of_a_schedule_are_those_it_promises(compiled: Compiled) -> None:
    lazy = compiled("mmdit")
    schedule = CacheSchedule.random(0.4, STEPS, len(lazy.branches), seed=3)
    lazy.policy = Scheduled(schedule)
    run(lazy, trajectory(TOYS["mmdit"], steps=STEPS))
    assert lazy.stats.lazy_ratio == pytest.approx(schedule.lazy_ratio)
    macs = [branch.macs for branch in lazy.branches]
    assert lazy.stats.compute_ratio == pytest.approx(schedule.compute_ratio(macs, lazy.graph.total_macs))


def test_statistics_start_again_at_reset_stats(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lazy.policy = NEVER
    run(lazy, trajectory(TOYS["dit"], steps=3))
    lazy.reset_stats()
    assert (lazy.stats.calls, lazy.stats.lazy_ratio, lazy.stats.compute_ratio) == (0, 0.0, 1.0)
    assert lazy.stats.reuse_table.size == 0


@pytest.mark.parametrize("toy", ["dit", "mmdit", "parallel", "windowed"])
def test_caches_take_the_memory_that_was_predicted(toy: str, compiled: Compiled) -> None:
    for reuse, kept in (("last", 1), ("linear", 2)):
        lazy = compiled(toy, reuse=reuse, hoist_step_invariants=False)
        lazy.policy = ALWAYS
        run(lazy, trajectory(TOYS[toy], steps=3))
        assert lazy.cache_bytes == lazy.expected_cache_bytes
        assert lazy.expected_cache_bytes == kept * sum(branch.output_bytes for branch in lazy.branches)


def test_an_example_batch_of_one_is_told_as_one() -> None:
    lazy = lazy_compile.transform(SMALL.model(), call(SMALL, 1))
    lazy.policy = ALWAYS
    run(lazy, trajectory(SMALL, 1, steps=3))
    assert lazy.cache_bytes == lazy.expected_cache_bytes == 2 * 2 * TOKENS * WIDTH * 4
    assert [entry.shape for branch in lazy.branches for entry in branch.entries] == [(1, TOKENS, WIDTH)] * 2
    assert lazy.branches[1].macs == TOKENS * 2 * WIDTH * 2 * WIDTH
    assert all(branch.row_separable for branch in lazy.branches)
