from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import lazy_compile
from lazy_compile import LazyModule, Learned
from lazy_compile.ir.branch_arms import state_names
from lazy_compile.ir.program import Role
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from lazy_compile.policies.gate_graph import decision
from lazy_compile.policies.gate_layout import GateLayout
from support.lowering import STEPS, OneBranch, Replay, forced, knots, random_gates, text
from support.toy_models import TOYS, call, trajectory

Compiled = Callable[..., LazyModule]


def one_branch() -> LazyModule:
    return lazy_compile.transform(OneBranch(), {"x": torch.ones(2, 3, 4), "s": torch.ones(2)})


def test_a_branch_becomes_a_gate_and_two_arms() -> None:
    lifted = LiftCacheSlots("last")(one_branch().graph.program).program
    assert text(lifted) == [
        "%0 = unsqueeze.default(s, 1)",
        "%1 = unsqueeze.default(%0, 2)",
        "%2 = mul.Tensor(%1, x)",
        "%3 = slice.Tensor(gate_weight, 0, 0, 4)",
        "%4 = select.int(gate_bias, 0, 0)",
        "%5 = gate_0(%2, %3, %4)",
        "%6 = decide_0(%5)",
        "%7 = arms_0(%6, cache_0_0, %2, first.weight, first.bias, second.weight, second.bias)",
        "%8 = getitem(%7, 0)",
        "%9 = add.Tensor(x, %8)",
        "%10 = getitem(%7, 1)",
        "%11 = stack.default([%5], 1)",
        "return (%9, %10, %11)",
    ]


def test_a_host_decides_by_one_boolean_for_each_gate() -> None:
    lifted = LiftCacheSlots("last", gating="input", predictors=False)(one_branch().graph.program).program
    assert text(lifted) == [
        "%0 = unsqueeze.default(s, 1)",
        "%1 = unsqueeze.default(%0, 2)",
        "%2 = mul.Tensor(%1, x)",
        "%3 = arms_0(should_compute_0, cache_0_0, %2, first.weight, first.bias, second.weight, second.bias)",
        "%4 = getitem(%3, 0)",
        "%5 = add.Tensor(x, %4)",
        "%6 = getitem(%3, 1)",
        "return (%5, %6)",
    ]
    assert state_names(lifted) == ("cache_0_0",)


def test_a_host_may_see_the_logits(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("linear", gating="input", leaders=(0, 0, 2, 2))(compiled("dit").graph.program).program
    gates = [item.name for item in lifted.inputs if item.role is Role.GATE]
    assert gates == ["slope", "should_compute_0", "should_compute_2", "gate_weight", "gate_bias"]
    assert state_names(lifted)[-1] == "compute_logits"


def test_branches_that_share_a_gate_share_its_decision_and_clock(compiled: Compiled) -> None:
    lazy = compiled("dit", group=2, batch_rule="all_reuse")
    leaders = lazy.graph.leaders(2)
    lifted = LiftCacheSlots("linear", leaders=leaders)(lazy.graph.program).program
    gates, layout = random_gates(lazy, knots()), GateLayout.of(lazy.branches, leaders)
    lazy.policy = Learned(gates)
    replay = Replay(lazy.original, void=7.0)
    for step, arguments in enumerate(trajectory(TOYS["dit"], steps=STEPS)):
        time = float(knots()[step])
        row = layout.row(gates.row(time))
        slopes = [gates.slopes(time)[index] for index in layout.gates]
        with torch.no_grad():
            expected = lazy(**arguments)
        outputs = replay(lifted, list(arguments.values()), row if step else forced(row), slopes)
        torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-5)
        assert replay.logits.shape == (2, 2)
        assert replay.slots["age"].shape == (2,)
    assert 0.1 < lazy.stats.lazy_ratio < 0.9


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_inputs_and_outputs_have_names_in_one_order(compiled: Compiled, reuse: str) -> None:
    lazy = compiled("mmdit")
    lifted = LiftCacheSlots(reuse)(lazy.graph.program).program
    slots = [
        f"{kind}_{branch.index}_{position}"
        for branch in lazy.branches
        for kind in (["cache", "delta"] if reuse == "linear" else ["cache"])
        for position in range(len(branch.outputs))
    ]
    names = [item.name for item in lifted.inputs if item.role is Role.SLOT]
    assert names == slots + (["age", "gap", "moved"] if reuse == "linear" else [])
    assert state_names(lifted) == (*names, "compute_logits")
    assert lifted.state_outputs == len(names) + 1
    gates = [item.name for item in lifted.inputs if item.role is Role.GATE]
    assert gates == (["slope"] if reuse == "linear" else []) + ["gate_weight", "gate_bias"]
    assert not [item for item in lifted.inputs if item.role is Role.LAZY_STEP]


@pytest.mark.parametrize("toy", ["dit", "mmdit", "windowed"])
@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("rule", ["all_reuse", "majority", "any_reuse"])
def test_it_decides_and_computes_as_pytorch_does(compiled: Compiled, toy: str, reuse: str, rule: str) -> None:
    lazy = compiled(toy, reuse=reuse, batch_rule=rule)
    table = random_gates(lazy, knots())
    lazy.policy = Learned(table)
    lifted = LiftCacheSlots(reuse, rule)(lazy.graph.program).program
    replay, decisions = Replay(lazy.original, void=7.0 if reuse == "linear" else float("nan")), []
    for step, arguments in enumerate(trajectory(TOYS[toy], steps=STEPS)):
        with torch.no_grad():
            expected = lazy(**arguments)
        time = float(knots()[step])
        row = table.row(time)
        outputs = replay(lifted, list(arguments.values()), row if step else forced(row), table.slopes(time))
        decisions.append(decision(replay.logits, rule).numpy())
        tolerance = 0.0 if reuse == "last" else 1e-5
        torch.testing.assert_close(outputs[0], torch.as_tensor(expected), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(np.array(decisions), lazy.stats.reuse_table == 0)
    assert 0.1 < lazy.stats.lazy_ratio < 0.9


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_it_is_the_original_bitwise_while_all_compute(compiled: Compiled, reuse: str) -> None:
    lazy = compiled("dit")
    lifted = LiftCacheSlots(reuse)(lazy.graph.program).program
    replay, row = Replay(lazy.original), forced(random_gates(lazy, knots()).row(0.0))
    for arguments in trajectory(TOYS["dit"], steps=3):
        with torch.no_grad():
            assert torch.equal(replay(lifted, list(arguments.values()), row)[0], lazy.original(**arguments))


def test_a_nan_computes(compiled: Compiled) -> None:
    lazy = compiled("dit")
    lifted = LiftCacheSlots("last", "any_reuse")(lazy.graph.program).program
    row = forced(random_gates(lazy, knots()).row(0.0), computes=False)
    row.bias[1] = float("nan")
    replay, tensors = Replay(lazy.original, void=7.0), list(call(TOYS["dit"]).values())
    replay(lifted, tensors, row)
    assert [bool((replay.slots[f"cache_{branch}_0"] == 7.0).all()) for branch in range(4)] == [True, False, True, True]


def test_a_branch_that_decides_once_repeats_its_logit(compiled: Compiled) -> None:
    lazy = compiled("windowed")
    assert [branch.row_separable for branch in lazy.branches] == [False, True]
    lifted = LiftCacheSlots("last")(lazy.graph.program).program
    replay = Replay(lazy.original)
    replay(lifted, list(call(TOYS["windowed"], batch=3).values()), random_gates(lazy, knots()).row(0.0))
    assert replay.logits.shape == (3, 2)
    assert [len(column.unique()) for column in replay.logits.unbind(1)] == [1, 3]


def test_a_gated_program_modified_true(compiled: Compiled) -> None:
    program = compiled("dit").graph.program
    before = str(program.graph)
    assert LiftCacheSlots("linear")(program).modified
    assert str(program.graph) == before


def test_a_lifted_program_modified_false(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("linear")(compiled("dit").graph.program).program
    assert not LiftCacheSlots("linear")(lifted).modified
