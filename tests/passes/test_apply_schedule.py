from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lazy_compile
from lazy_compile import CacheSchedule, LazyModule, Scheduled
from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch_arms import state_names
from lazy_compile.ir.program import Program, Role
from lazy_compile.passes.apply_schedule import ApplySchedule
from lazy_compile.passes.lift_cache_slots import LiftCacheSlots
from support.lowering import STEPS, OneBranch, Replay, text
from support.toy_models import TOYS, trajectory

Compiled = Callable[..., LazyModule]


def names(program: Program, role: Role) -> list[str]:
    return [item.name for item in program.inputs if item.role is role]


@pytest.mark.parametrize(
    ("computes", "lines"),
    [
        (
            True,
            [
                "%0 = unsqueeze.default(s, 1)",
                "%1 = unsqueeze.default(%0, 2)",
                "%2 = mul.Tensor(%1, x)",
                "%3 = linear.default(%2, first.weight, first.bias)",
                "%4 = relu.default(%3)",
                "%5 = linear.default(%4, second.weight, second.bias)",
                "%6 = add.Tensor(x, %5)",
                "return (%6, %5)",
            ],
        ),
        (False, ["%0 = add.Tensor(x, cache_0_0)", "return (%0)"]),
    ],
)
def test_one_arm_is_left(computes: bool, lines: list[str]) -> None:
    lazy = lazy_compile.transform(OneBranch(), {"x": torch.ones(2, 3, 4), "s": torch.ones(2)})
    lean = ApplySchedule((computes,))(LiftCacheSlots("last")(lazy.graph.program).program).program
    assert text(lean) == lines
    assert names(lean, Role.USER) == ["x", "s"]
    assert len(names(lean, Role.PARAMETER)) == (4 if computes else 0)


def test_only_what_a_step_needs_goes_in_and_only_what_it_changes_comes_out(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("last")(compiled("dit").graph.program).program
    lean = ApplySchedule((True, False, True, False))(lifted).program
    assert names(lean, Role.SLOT) == ["cache_1_0", "cache_3_0"]
    assert state_names(lean) == ("cache_0_0", "cache_2_0")
    assert names(lean, Role.GATE) == []
    assert not lean.graph.find_nodes(op="call_module")


def test_linear_reuse_keeps_the_time(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("linear")(compiled("dit").graph.program).program
    lean = ApplySchedule((True, False, False, False))(lifted).program
    assert names(lean, Role.SLOT)[:3] == ["cache_0_0", "delta_0_0", "cache_1_0"]
    assert state_names(lean) == ("cache_0_0", "delta_0_0", "cache_1_0", "cache_2_0", "cache_3_0", "age", "gap", "moved")


@pytest.mark.parametrize("gating", ["predicate", "input"])
def test_branches_that_share_a_gate_must_agree(compiled: Compiled, gating: str) -> None:
    lifted = LiftCacheSlots("linear", gating=gating, leaders=(0, 0, 2, 2))(compiled("dit").graph.program).program
    lean = ApplySchedule((True, True, False, False))(lifted).program
    assert lean.constants["should_compute"].tolist() == [True, False]
    assert names(lean, Role.GATE) == ["slope"]
    with pytest.raises(ConfigError, match="branch 3 shares a gate with one that does otherwise; tie the schedule"):
        ApplySchedule((True, True, False, True))(lifted)


@pytest.mark.parametrize("toy", ["dit", "mmdit"])
@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_a_program_for_each_step_follows_the_schedule(compiled: Compiled, toy: str, reuse: str) -> None:
    lazy = compiled(toy, reuse=reuse)
    schedule = CacheSchedule.random(0.5, STEPS, len(lazy.branches), seed=1)
    lazy.policy = Scheduled(schedule)
    lifted = LiftCacheSlots(reuse)(lazy.graph.program).program
    replay = Replay(lazy.original)
    for step, arguments in enumerate(trajectory(TOYS[toy], steps=STEPS)):
        lean = ApplySchedule(tuple(schedule.should_compute[step].tolist()))(lifted).program
        with torch.no_grad():
            expected = lazy(**arguments)
        tolerance = 0.0 if reuse == "last" else 1e-5
        torch.testing.assert_close(replay(lean, list(arguments.values()))[0], expected, rtol=tolerance, atol=tolerance)


def test_a_lifted_program_modified_true(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("linear")(compiled("dit").graph.program).program
    before = str(lifted.graph), dict(lifted.constants)
    assert ApplySchedule((True,) * 4)(lifted).modified
    assert (str(lifted.graph), lifted.constants) == before


def test_other_programs_modified_false(compiled: Compiled) -> None:
    program = compiled("dit").graph.program
    lean = ApplySchedule((True,) * 4)(LiftCacheSlots("linear")(program).program).program
    assert not ApplySchedule((True,) * 4)(program).modified
    assert not ApplySchedule((False,) * 4)(lean).modified


def test_a_schedule_of_another_model_is_refused(compiled: Compiled) -> None:
    lifted = LiftCacheSlots("last")(compiled("dit").graph.program).program
    with pytest.raises(ConfigError, match="the step has 3 decisions, the model has 4 branches; give one decision for"):
        ApplySchedule((True, True, True))(lifted)
