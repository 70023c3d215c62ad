"""Caches, extrapolation and the account of what was saved, without a model around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lazy_compile import LazyConfig, Policy
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.passes.discover_branches import DiscoverBranches
from lazy_compile.passes.insert_gates import InsertGates
from lazy_compile.passes.outline_branches import OutlineBranches
from lazy_compile.policies.policy import GateQuery
from lazy_compile.runtime.cache import CacheState, extrapolate
from lazy_compile.runtime.model_call import RowGroup
from lazy_compile.runtime.policy_step import PolicyStep
from lazy_compile.runtime.stats import LazyStats
from support.graph_text import program

SOURCE = """
    x: f32[B, N, 8]
    w: param f32[8, 8]
    d = linear(x, w)
    y = add.Tensor(x, d)
    return y
"""


class Answers(Policy):
    def __init__(self, answers: Sequence[Any]) -> None:
        self.answers = answers
        self.queries: list[GateQuery] = []

    def should_compute(self, query: GateQuery) -> bool | Tensor:
        self.queries.append(query)
        answer = self.answers[query.step]
        return answer if isinstance(answer, bool) else torch.tensor(answer)


def branch() -> LazyBranch:
    found = program(SOURCE)
    for graph_pass in (DiscoverBranches(), OutlineBranches(), InsertGates()):
        found = graph_pass(found).program
    module = found.graph_module.get_submodule("lazy_branch_0")
    assert isinstance(module, LazyBranch)
    return module


def at(step: int, timestep: float = 0.0) -> tuple[RowGroup, ...]:
    """All rows of a call at one step."""
    return (RowGroup(None, step, timestep, None),)


def evaluate(answers: Sequence[Any], values: Sequence[Sequence[float]], **options: Any) -> tuple[list[Any], CacheState]:
    """One branch that hands on its input, ``values[step][row]``, over a trajectory; its outputs ``[step][row]``."""
    state, outputs, lazy = CacheState(), [], branch()
    for step, rows in enumerate(values):
        x = torch.tensor(rows)[:, None, None].expand(-1, 4, 8).contiguous()
        now = PolicyStep(Answers(answers), LazyConfig(**options), state, at(step, float(step)))
        (output,) = now.evaluate(lazy, [x, torch.eye(8)])
        outputs.append(output[:, 0, 0].tolist())
    return outputs, state


def test_the_last_output_is_repeated() -> None:
    outputs, state = evaluate([True, False, True, False, False], [[1.0], [2.0], [4.0], [5.0], [6.0]], reuse="last")
    assert outputs == [[1.0], [1.0], [4.0], [4.0], [4.0]]
    assert not state.slots[0].earlier


def test_the_line_through_the_last_two_outputs_is_followed() -> None:
    outputs, _ = evaluate([True, True, False, False, True, False], [[1.0], [3.0], [0.0], [0.0], [0.0], [0.0]])
    assert outputs == [[1.0], [3.0], [5.0], [7.0], [0.0], [-1.0]]  # the last two lie 3 steps apart


def test_one_output_gives_no_line() -> None:
    outputs, _ = evaluate([True, False, False], [[1.0], [3.0], [9.0]])
    assert outputs == [[1.0], [1.0], [1.0]]


def test_every_row_follows_its_own_line() -> None:
    answers = [True, [True, False, True], [False, True, True], [False, False, False]]
    outputs, state = evaluate(answers, [[0.0, 0.0, 0.0], [1.0, 10.0, 5.0], [2.0, 20.0, 6.0], [3.0, 30.0, 7.0]])
    assert outputs == [
        [0.0, 0.0, 0.0],
        [1.0, 0.0, 5.0],  # the middle row has one output only
        [2.0, 20.0, 6.0],  # the first row on its line of slope 1
        [3.0, 30.0, 7.0],  # the middle row has slope 10, over two steps
    ]
    slot = state.slots[0]
    assert slot.computed_at.tolist() == [1, 2, 2]
    assert slot.computed_before.tolist() == [[0, 0, 1]]


def test_rows_that_compute_are_given_to_the_body_and_no_others() -> None:
    lazy, sizes = branch(), []
    body = lazy.body.forward
    lazy.body.forward = lambda *inputs: sizes.append(len(inputs[0])) or body(*inputs)
    state = CacheState()
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    for step, answer in enumerate([True, [False, True, False, True], False]):
        step_now = PolicyStep(Answers([answer] * 3), LazyConfig(), state, at(step))
        step_now.evaluate(lazy, [x, torch.eye(8)])
    assert sizes == [4, 2]


def test_a_policy_is_not_asked_where_there_is_no_choice() -> None:
    policy, state, lazy = Answers([False] * 4), CacheState(), branch()
    for step, rows in enumerate([2, 2, 3, 3]):
        PolicyStep(policy, LazyConfig(), state, at(step, 7.0)).evaluate(lazy, [torch.ones(rows, 4, 8), torch.eye(8)])
    assert [query.step for query in policy.queries] == [1, 3]
    assert {query.timestep for query in policy.queries} == {7.0}
    assert policy.queries[0].memory is policy.queries[1].memory
    assert [entry.shape for entry in policy.queries[1].entries] == [(3, 4, 8)]


def test_a_cache_holds_no_part_of_a_gradient() -> None:
    state, weight = CacheState(), torch.eye(8, requires_grad=True)
    step = PolicyStep(Answers([True]), LazyConfig(), state, at(0))
    (output,) = step.evaluate(branch(), [torch.ones(2, 4, 8), weight])
    assert output.requires_grad
    assert not any(value.requires_grad for value in state.slots[0].values)


def test_what_another_graph_cached_is_reused_only_if_it_agrees() -> None:
    inputs, lazy = [torch.ones(2, 4, 8), torch.eye(8)], branch()
    (output,) = lazy.branch.outputs
    others = [
        replace(lazy.branch, name="another"),
        replace(lazy.branch, outputs=(replace(output, dtype="float16"),)),
        replace(lazy.branch, macs=3),  # the same branch, captured again
    ]
    for other, computes in zip(others, [True, True, False], strict=True):
        state, stats = CacheState(), LazyStats(np.ones(1), 10)
        for step, description in enumerate([lazy.branch, other]):
            now = PolicyStep(Answers([False] * 2), LazyConfig(), state, at(step))
            now.evaluate(LazyBranch(lazy.body, description, lazy.row_axes), inputs)
            now.record(stats)
        assert stats.reuse_table[1, 0] == (0.0 if computes else 1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_only_counts_is_repeated(dtype: torch.dtype) -> None:
    value, previous = torch.ones(2, 3).to(dtype), torch.zeros(2, 3).to(dtype)
    assert torch.equal(extrapolate(value, [previous], np.array([[-2.0, -3.0]]), 0), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extrapolation_keeps_the_type(dtype: torch.dtype) -> None:
    value, previous = torch.full((2, 3), 4.0, dtype=dtype), torch.full((2, 3), 3.0, dtype=dtype)
    for axis, result in ((0, [6.0, 7.0]), (None, [6.0, 6.0])):
        output = extrapolate(value, [previous], np.array([[-2.0, -3.0]]), axis)
        assert output.dtype == dtype
        assert output[:, 0].tolist() == result


def test_an_account_grows_with_the_steps() -> None:
    stats = LazyStats(np.array([1.0, 3.0]), 8)
    assert (stats.lazy_ratio, stats.compute_ratio, stats.reuse_table.shape) == (0.0, 1.0, (0, 0))
    stats.record(0, 0, np.array([True, True]))
    stats.record(0, 1, np.array([True, True]))
    stats.record(2, 1, np.array([True, False]))
    stats.record(2, 1, np.array([False, False]))
    assert stats.reuse_table.tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.75]]
    assert stats.lazy_ratio == pytest.approx((0 / 2 + 3 / 6) / 2)
    assert stats.compute_ratio == pytest.approx(1 - 3 * 0.5 / 8)
    assert stats.decisions_varying_between_samples == 0.5
