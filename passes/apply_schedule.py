"""Fix the decisions of one denoising step: the lean program of one row of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch_arms import DECISIONS, STATE_NAMES, BranchArms, inline, replace_results, state_names
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.operators import value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, ProgramInput, Role
from lazy_compile.ir.state_tensors import LOGITS


@dataclass(frozen=True)
class ApplySchedule(GraphPass):
    """Of every branch of a lifted program keep one arm.

    ::

                                                    it computes              it reuses
        %decide_0 = decide_0(%gate_0)           |   %o = linear(...)     |
        %arms_0 = arms_0(%decide_0, %cache_0_0) |                        |
        %g = mul(%gate_msa, %arms_0[0])         |   %g = mul(..., %o)    |   %g = mul(..., %cache_0_0)
        return (%y, %arms_0[1], %logits)        |   return (%y, %o)      |   return (%y,)

    1. The outputs behind the model's own are the slots that this step changes, named by
       :func:`lazy_compile.ir.branch_arms.state_names`: the caller keeps all others.
    2. Inputs that nothing reads any more are dropped: gates, the slots of branches that compute, the parameters of
       branches that reuse. The user's own inputs stay.
    3. Extrapolation keeps its clock; the decisions of this step are a constant of the program. Branches that share a
       gate must agree.

    The model's own outputs are those of the lifted program for the same decisions, bit for bit.

    Raises:
        ConfigError: there is not one decision for each branch, or branches of one gate have two.
    """

    should_compute: tuple[bool, ...]

    def apply(self, program: Program) -> bool:
        modules = dict(program.graph_module.named_children())
        arms = {
            call: module
            for call in program.graph.find_nodes(op="call_module")
            if isinstance(module := modules[str(call.target)], BranchArms)
        }
        if not arms:
            return False
        if len(self.should_compute) != len(program.branches):
            raise ConfigError(
                f"the step has {len(self.should_compute)} decisions, the model has {len(program.branches)} branches; "
                "give one decision for each branch"
            )
        decided: dict[fx.Node, bool] = {}
        for call in arms:
            computes = self.should_compute[call.meta[TAG]]
            if decided.setdefault(call.args[0], computes) != computes:
                raise ConfigError(
                    f"branch {call.meta[TAG]} shares a gate with one that does otherwise; tie the schedule"
                )
        for call, module in arms.items():
            _keep_one_arm(call, module, self.should_compute[call.meta[TAG]])
        for call in program.graph.find_nodes(op="call_module", target=DECISIONS):
            _fix_decisions(program, call, [decided[gate] for gate in call.args])
        _drop_unchanged_state(program)
        program.graph.eliminate_dead_code()
        _drop_unused_inputs(program)
        program.graph_module.delete_all_unused_submodules()
        return True


def _keep_one_arm(call: fx.Node, arms: BranchArms, computes: bool) -> None:
    state, inputs = arms.split(call.args[1:])
    bases = arms.bases(inputs)
    if computes:
        outputs = inline(call, arms.body, inputs)
        caches = inline(call, arms.keep, [*outputs, *bases]) if arms.keep else outputs
        deltas = inline(call, arms.renew, [*state, *caches])
    else:
        caches = inline(call, arms.move, state)
        outputs = inline(call, arms.restore, [*caches, *bases]) if arms.restore else caches
        deltas = arms.deltas(state)
    replace_results(call, [*outputs, *caches, *deltas])


def _fix_decisions(program: Program, call: fx.Node, should_compute: Sequence[bool]) -> None:
    example = next(value_of(node) for node in program.placeholders if node.target == "age")
    decisions = torch.tensor(should_compute, device=example.device)
    with program.graph.inserting_before(program.placeholders[0]):
        constant = program.graph.placeholder("should_compute")
    constant.meta["val"] = example.fake_mode.from_tensor(decisions)
    program.inputs = (ProgramInput(Role.CONSTANT, "should_compute"), *program.inputs)
    program.constants = {**program.constants, "should_compute": decisions}
    call.replace_all_uses_with(constant)


def _drop_unchanged_state(program: Program) -> None:
    output = program.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    own = len(results) - program.state_outputs
    state = {
        name: node
        for name, node in zip(state_names(program), results[own:], strict=True)
        if name != LOGITS and not (isinstance(node, fx.Node) and node.target == name)
    }
    output.args = ((*results[:own], *state.values()),)
    output.meta[STATE_NAMES] = tuple(state)
    program.state_outputs = len(state)


def _drop_unused_inputs(program: Program) -> None:
    kept = []
    for node, item in zip(program.placeholders, program.inputs, strict=True):
        if node.users or item.role is Role.USER:
            kept.append(item)
        else:
            program.graph.erase_node(node)
    program.inputs = tuple(kept)
