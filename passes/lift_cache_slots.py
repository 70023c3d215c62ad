"""Turn the caches and gates of a program into plain inputs and outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lazy_compile.config import BatchRule, ReuseArm, reuse_order
from lazy_compile.ir.branch_arms import DECISIONS, STATE_NAMES, BranchArms, formula, inline
from lazy_compile.ir.extrapolation import SLOPE, advance_clock, clock_names, read_clock
from lazy_compile.ir.lazy_branch import LazyBranch, lazy_calls
from lazy_compile.ir.operators import value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, ProgramInput, Role
from lazy_compile.ir.state_tensors import GATE_BIAS, GATE_WEIGHT, LOGITS, decision_name, slot_names
from lazy_compile.policies.gate_graph import add_decision, add_predictor, logit_table
from lazy_compile.policies.gate_layout import GateLayout

aten = torch.ops.aten


@dataclass(frozen=True)
class LiftCacheSlots(GraphPass):
    """A program without hidden state: caches and gates come in, new caches and logits go out.

    ::

        %lazy_step = placeholder            |   %cache_0_0, %gate_weight, %gate_bias = placeholder
        %lazy_branch_0 = lazy_branch_0(     |   %gate_0 = gate_0(%modulated, %gate_weight[0:D], %gate_bias[0])
            %lazy_step, %modulated, %w)     |   %decide_0 = decide_0(%gate_0)
        %out = getitem(%lazy_branch_0, 0)   |   %arms_0 = arms_0(%decide_0, %cache_0_0, %modulated, %w)
        return (%y,)                        |   %out    = getitem(%arms_0, 0)
                                            |   return (%y, getitem(%arms_0, 1), %compute_logits)

    1. Slots are inputs of role SLOT: ``cache_{branch}_{output}``, and unless ``reuse="last"`` also
       ``delta_{branch}_{output}``, with ``"taylor"`` one for each order. The outputs behind the model's own are the
       next values of all slots, in the order of the inputs, then ``compute_logits: float32[rows, G]``.
    2. Extrapolation moves a cache on by parts of its differences. :mod:`lazy_compile.ir.extrapolation` says how, and
       names the slots ``float32[G]`` that keep time, and the input ``slope: float32[G]`` of role GATE.
    3. ``leaders`` says for each branch which one decides for it; G gates belong to those that decide for themselves.
       Empty stands for every branch.
    4. ``gating="predicate"``: inputs of role GATE are one row of a gate table, ``gate_weight: float32[sum of
       gate_features]`` and ``gate_bias: float32[G]``. A bias of +FORCE computes and -FORCE reuses, whatever the gate
       reads. A branch takes one decision a call: ``batch_rule`` joins those of the rows, a NaN computes.
       ``"per_sample"`` is lowered as ``"all_reuse"``. A branch whose rows cannot be separated shows its one logit in
       every row.
    5. ``gating="input"``: inputs of role GATE are ``should_compute_{branch}: bool[]``, one for each gate. With
       ``predictors`` the row of a gate table comes in too and the logits go out, for whoever decides the next step.
    6. A slot starts as :func:`lazy_compile.ir.state_tensors.initial_value` says. Nothing here knows a first step: the
       caller forces it to compute.

    While every branch computes, the model's own outputs are preserved bit for bit.
    """

    reuse: ReuseArm
    batch_rule: BatchRule = "all_reuse"
    gating: Literal["predicate", "input"] = "predicate"
    leaders: tuple[int, ...] = ()
    predictors: bool = True
    order: int = 2

    @property
    def _order(self) -> int:
        return reuse_order(self.reuse, self.order)

    def apply(self, program: Program) -> bool:
        calls = sorted(lazy_calls(program), key=lambda item: item[1].branch.index)
        if not calls:
            return False
        _remove_step(program)
        layout = GateLayout.of(program.branches, self.leaders)
        inputs = self._add_inputs(program, [call for call, _ in calls], layout)
        scalars: list[fx.Node] = []
        order, names = self._order, clock_names(self._order)
        if order:
            reading = formula([*names, SLOPE], lambda *given: read_clock(order, given[:-1], given[-1]))
            shifts = inline(_first_operator(program), reading, [inputs[name] for name in (*names, SLOPE)])
            scalars = [*shifts, *(inputs[name] for name in names[1 + order :])]
        logits: dict[int, fx.Node] = {}
        decisions: dict[int, fx.Node] = {}
        for call, lazy in lazy_calls(program):
            index = lazy.branch.index
            if index in layout.gates:
                if GATE_BIAS in inputs:
                    logits[index] = add_predictor(program, call, lazy, inputs, layout)
                decisions[index] = inputs.get(decision_name(index)) or add_decision(
                    program, call, index, logits[index], self.batch_rule
                )
            self._lift(program, call, lazy, inputs, scalars, layout, decisions[layout.leaders[index]])
        self._add_outputs(program, calls, inputs, dict(sorted(logits.items())), dict(sorted(decisions.items())))
        return True

    def _add_inputs(self, program: Program, calls: Sequence[fx.Node], layout: GateLayout) -> dict[str, fx.Node]:
        """All new placeholders by name."""
        slots: dict[str, Any] = {}
        gates: dict[str, Any] = {}
        for index, call in enumerate(calls):
            outputs = value_of(call)
            names = slot_names(index, len(outputs), self._order)
            slots.update(zip(names, outputs * (len(names) // len(outputs)), strict=True))
        sample, count = next(iter(slots.values())), len(layout.gates)
        with sample.fake_mode:
            if self._order:
                slots |= {name: torch.empty(count, device=sample.device) for name in clock_names(self._order)}
                gates[SLOPE] = torch.empty(count, device=sample.device)
            if self.gating == "input":
                empty = torch.empty((), dtype=torch.bool, device=sample.device)
                gates |= {decision_name(index): empty for index in layout.gates}
            if self.gating == "predicate" or self.predictors:
                sizes = ((GATE_WEIGHT, layout.width), (GATE_BIAS, count))
                gates |= {name: torch.empty(size, device=sample.device) for name, size in sizes}
        nodes = {}
        with program.graph.inserting_before(_first_operator(program)):
            for name, value in (slots | gates).items():
                nodes[name] = program.graph.placeholder(name)
                nodes[name].meta["val"] = value
        program.inputs += tuple(ProgramInput(Role.GATE if name in gates else Role.SLOT, name) for name in nodes)
        return nodes

    def _lift(
        self,
        program: Program,
        call: fx.Node,
        lazy: LazyBranch,
        inputs: dict[str, fx.Node],
        scalars: Sequence[fx.Node],
        layout: GateLayout,
        should_compute: fx.Node,
    ) -> None:
        """Replace one lazy branch by its arms."""
        branch = lazy.branch
        slots = [inputs[name] for name in slot_names(branch.index, len(branch.outputs), self._order)]
        program.graph_module.add_submodule(f"arms_{branch.index}", BranchArms(lazy.body, branch, self._order))
        program.graph_module.delete_submodule(str(call.target))
        with program.graph.inserting_before(call):
            gate_index = layout.gate_of(branch.index)
            own = [aten.select.int(fx.Proxy(vector), 0, gate_index).node for vector in scalars]
        call.target = f"arms_{branch.index}"
        call.args = (should_compute, *own, *slots, *call.args[1:])

    def _add_outputs(
        self,
        program: Program,
        calls: Sequence[tuple[fx.Node, LazyBranch]],
        inputs: dict[str, fx.Node],
        logits: dict[int, fx.Node],
        decisions: dict[int, fx.Node],
    ) -> None:
        output = program.graph.output_node()
        state: dict[str, fx.Node] = {}
        with program.graph.inserting_before(output):
            for call, lazy in calls:
                outputs = len(lazy.branch.outputs)
                names = slot_names(lazy.branch.index, outputs, self._order)
                for position, name in enumerate(names):
                    state[name] = program.graph.call_function(operator.getitem, (call, outputs + position))
                call.meta["val"] = (*value_of(call), *(value_of(inputs[name]) for name in names))
            if order := self._order:
                names = [decision_name(index) for index in decisions]
                program.graph_module.add_submodule(DECISIONS, formula(names, lambda *each: aten.stack.default(each)))
                computes = program.graph.call_module(DECISIONS, tuple(decisions.values()))
                clock = clock_names(order)
                advancing = formula(
                    ["computes", *clock, SLOPE], lambda *given: advance_clock(order, given[0], given[1:-1], given[-1])
                )
                times = inline(output, advancing, [computes, *(inputs[name] for name in (*clock, SLOPE))])
                state.update(zip(clock, times, strict=True))
            if logits:
                state[LOGITS] = logit_table(program, logits)
        output.args = ((*output.args[0], *state.values()),)  # type: ignore[misc]
        output.meta[STATE_NAMES] = tuple(state)
        program.state_outputs = len(state)


def _first_operator(program: Program) -> fx.Node:
    return program.placeholders[-1].next


def _remove_step(program: Program) -> None:
    position = next(index for index, item in enumerate(program.inputs) if item.role is Role.LAZY_STEP)
    step = program.placeholders[position]
    for user in list(step.users):
        user.args = (None, *user.args[1:])
    program.graph.erase_node(step)
    program.inputs = program.inputs[:position] + program.inputs[position + 1 :]
