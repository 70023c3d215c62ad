from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lazy_compile
from lazy_compile import LazyModule
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.operators import is_heavy
from lazy_compile.ir.program import Program
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.passes.lower_to_select import LowerToSelect
from lazy_compile.passes.merge_groups import SELECT, MergeGroups
from lazy_compile.policies.gate_layout import GateLayout
from support.lowering import Replay, forced, knots, random_gates, text
from support.slow import slow_but
from support.toy_models import TOYS, trajectory

Compiled = Callable[..., LazyModule]


class TwoBranches(nn.Module):
    """``y = x + a(s x)``, ``z = y + b(s y)``; with a heavy operator of neither between them, if asked."""

    def __init__(self, heavy: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = nn.Linear(4, 4) if heavy else nn.Identity()

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        y = self.between(x + self.a(s[:, None, None] * x))
        return y + self.b(s[:, None, None] * y)


def lowered(model: LazyModule, reuse: str, group: int | str, gating: str = "predicate") -> Program:
    leaders = model.graph.leaders(group)
    lift = LiftCacheSlots(reuse, gating=gating, leaders=leaders, predictors=gating == "predicate")
    return LowerToSelect()(lift(model.graph.program).program).program


def two_branches(heavy: bool = False) -> LazyModule:
    return lazy_compile.transform(TwoBranches(heavy), {"x": torch.ones(2, 3, 4), "s": torch.ones(2)})


def selects(program: Program) -> Counter[int]:
    return Counter(node.args[3] for node in program.graph.find_nodes(op="call_function", target=SELECT))


def test_glue_is_copied_into_both_arms() -> None:
    before = lowered(two_branches(), "last", 2, gating="input")
    assert text(before) == [
        "%0 = unsqueeze.default(s, 1)",
        "%1 = unsqueeze.default(%0, 2)",
        "%2 = mul.Tensor(%1, x)",
        "%3 = linear.default(%2, a.weight, a.bias)",
        "%4 = select.default(should_compute_0, %3, cache_0_0, 0)",
        "%5 = add.Tensor(x, %4)",
        "%6 = mul.Tensor(%1, %5)",
        "%7 = linear.default(%6, b.weight, b.bias)",
        "%8 = select.default(should_compute_0, %7, cache_1_0, 1)",
        "%9 = add.Tensor(%5, %8)",
        "return (%9, %4, %8)",
    ]
    assert text(MergeGroups()(before).program) == [
        "%0 = unsqueeze.default(s, 1)",
        "%1 = unsqueeze.default(%0, 2)",
        "%2 = mul.Tensor(%1, x)",
        "%3 = linear.default(%2, a.weight, a.bias)",
        "%4 = select.default(should_compute_0, %3, cache_0_0, 0)",
        "%5 = add.Tensor(x, %3)",
        "%6 = add.Tensor(x, cache_0_0)",
        "%7 = mul.Tensor(%1, %5)",
        "%8 = linear.default(%7, b.weight, b.bias)",
        "%9 = select.default(should_compute_0, %8, cache_1_0, 0)",
        "%10 = add.Tensor(%5, %8)",
        "%11 = add.Tensor(%6, cache_1_0)",
        "%12 = select.default(should_compute_0, %10, %11, 0)",
        "return (%12, %4, %9)",
    ]


def test_glue_that_is_heavy_stays_outside() -> None:
    lazy = two_branches(heavy=True)
    assert [item.path for item in lazy.branches] == ["a", "b"]
    before = lowered(lazy, "last", 2)
    result = MergeGroups()(before)
    assert not result.modified
    assert selects(result.program) == {0: 1, 1: 1}


@pytest.mark.parametrize(
    "toy",
    slow_but(["dit", "mmdit", "uvit"], ["dit", "mmdit", "cross", "uvit", "parallel", "gated_sandwich", "gated_post"]),
)
@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("group", [2, 3, "block", 99])
def test_numerics_are_preserved_bitwise(compiled: Compiled, toy: str, reuse: str, group: int | str) -> None:
    lazy = compiled(toy)
    before = lowered(lazy, reuse, group)
    after = MergeGroups()(before).program
    table = random_gates(lazy, knots(6))
    layout = GateLayout.of(lazy.branches, lazy.graph.leaders(group))
    first, second = Replay(lazy.original), Replay(lazy.original)
    for step, arguments in enumerate(trajectory(TOYS[toy], steps=6)):
        row = layout.row(table.row(float(knots(6)[step])))
        row = row if step else forced(row)
        tensors = list(arguments.values())
        assert all(map(torch.equal, first(before, tensors, row), second(after, tensors, row)))
        assert all(torch.equal(first.slots[name], second.slots[name]) for name in first.slots)


@pytest.mark.parametrize(("toy", "group", "numbers"), [("dit", 2, {0, 2}), ("cross", "block", {0, 3}), ("dit", 4, {0})])
def test_a_group_is_one_conditional(compiled: Compiled, toy: str, group: int | str, numbers: set[int]) -> None:
    after = MergeGroups()(lowered(compiled(toy), "last", group)).program
    assert set(selects(after)) == numbers


def test_residual_adds_and_bodies_are_inside(compiled: Compiled) -> None:
    """What an arm needs is what is not read outside of the selects: then no add is left between two branches."""
    lazy = compiled("dit")
    after = MergeGroups()(lowered(lazy, "last", 4)).program
    choices = after.graph.find_nodes(op="call_function", target=SELECT)
    read = {reader for choice in choices for reader in choice.users}
    assert not any(is_heavy(reader) and TAG in reader.meta for reader in read)
    assert selects(after) == {0: 5}, "four caches and the stream behind the last residual add"


def test_a_group_of_two_modified_true(compiled: Compiled) -> None:
    program = lowered(compiled("dit"), "linear", 2)
    before = str(program.graph)
    assert MergeGroups()(program).modified
    assert str(program.graph) == before


def test_groups_of_one_modified_false(compiled: Compiled) -> None:
    program = lowered(compiled("dit"), "linear", 1)
    assert not MergeGroups()(program).modified
