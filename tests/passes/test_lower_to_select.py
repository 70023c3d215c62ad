from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

import lazy_compile
from lazy_compile import LazyModule
from lazy_compile.ir.branch_arms import select
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.operators import is_heavy
from lazy_compile.ir.program import Program
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.passes.lower_to_select import LowerToSelect
from support.lowering import STEPS, OneBranch, Replay, forced, knots, random_gates, text
from support.toy_models import TOYS, trajectory

Compiled = Callable[..., LazyModule]
SELECT = torch.ops.lazy_compile.select.default


def lower(program: Program, reuse: str, rule: str = "all_reuse") -> Program:
    return LowerToSelect()(LiftCacheSlots(reuse, rule)(program).program).program


def test_a_branch_becomes_its_body_and_a_select() -> None:
    lazy = lazy_compile.transform(OneBranch(), {"x": torch.ones(2, 3, 4), "s": torch.ones(2)})
    assert text(lower(lazy.graph.program, "last")) == [
        "%0 = unsqueeze.default(s, 1)",
        "%1 = unsqueeze.default(%0, 2)",
        "%2 = mul.Tensor(%1, x)",
        "%3 = slice.Tensor(gate_weight, 0, 0, 4)",
        "%4 = select.int(gate_bias, 0, 0)",
        "%5 = mean.dim(%2, [1])",
        "%6 = mul.Tensor(%5, %3)",
        "%7 = sum.dim_IntList(%6, [1])",
        "%8 = add.Tensor(%7, %4)",
        "%9 = le.Scalar(%8, 0.0)",
        "%10 = _to_copy.default(%9)",
        "%11 = amin.default(%10, [0])",
        "%12 = lt.Scalar(%11, 0.5)",
        "%13 = linear.default(%2, first.weight, first.bias)",
        "%14 = relu.default(%13)",
        "%15 = linear.default(%14, second.weight, second.bias)",
        "%16 = select.default(%12, %15, cache_0_0, 0)",
        "%17 = add.Tensor(x, %16)",
        "%18 = stack.default([%8], 1)",
        "return (%17, %16, %18)",
    ]


@pytest.mark.parametrize(("reuse", "selects"), [("last", 1), ("linear", 2)])
def test_every_output_and_slot_is_selected_once(compiled: Compiled, reuse: str, selects: int) -> None:
    lazy = compiled("mmdit")
    flat = lower(lazy.graph.program, reuse)
    found = Counter(node.args[3] for node in flat.graph.find_nodes(op="call_function", target=SELECT))
    assert found == {branch.index: selects * len(branch.outputs) for branch in lazy.branches}
    assert not flat.graph.find_nodes(op="call_module")


def test_bodies_carry_the_index_of_their_branch(compiled: Compiled) -> None:
    program = compiled("dit").graph.program
    flat = lower(program, "linear")
    heavy = Counter(node.meta[TAG] for node in flat.graph.nodes if is_heavy(node) and TAG in node.meta)
    bodies = [program.graph_module.get_submodule(f"lazy_branch_{index}").body for index in range(4)]
    assert [heavy[index] for index in range(4)] == [sum(map(is_heavy, body.graph.nodes)) for body in bodies]


@pytest.mark.parametrize("toy", ["dit", "mmdit", "windowed"])
@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("rule", ["all_reuse", "majority", "any_reuse"])
def test_it_equals_the_lifted_program_bitwise(compiled: Compiled, toy: str, reuse: str, rule: str) -> None:
    lazy = compiled(toy)
    lifted = LiftCacheSlots(reuse, rule)(lazy.graph.program).program
    flat = LowerToSelect()(lifted).program
    table = random_gates(lazy, knots())
    first, second = Replay(lazy.original), Replay(lazy.original)
    for step, arguments in enumerate(trajectory(TOYS[toy], steps=STEPS)):
        row = table.row(float(knots()[step]))
        row = row if step else forced(row)
        tensors = list(arguments.values())
        assert all(map(torch.equal, first(lifted, tensors, row), second(flat, tensors, row)))
        assert torch.equal(first.logits, second.logits)
        assert all(torch.equal(first.slots[name], second.slots[name]) for name in first.slots)


def test_select_follows_the_rules_of_custom_operators() -> None:
    tensors = torch.randn(2, 3), torch.randn(3, 2).t()
    for condition in (torch.tensor(True), torch.tensor(False)):
        torch.library.opcheck(select, (condition, *tensors, 0))
        assert torch.equal(select(condition, *tensors, 0), tensors[0] if condition else tensors[1])


def test_a_lifted_program_modified_true(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("last")(compiled("dit").graph.program).program
    before = str(lifted.graph)
    assert LowerToSelect()(lifted).modified
    assert str(lifted.graph) == before


def test_other_programs_modified_false(compiled: Compiled) -> None:
    program = compiled("dit").graph.program
    assert not LowerToSelect()(program).modified
    assert not LowerToSelect()(lower(program, "last")).modified
