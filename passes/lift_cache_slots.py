"""Turn the caches and gates of a program into plain inputs and outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lazy_compile.config import BatchRule, ReuseArm
from lazy_compile.extrapolation import CLOCK, advance_clock, read_clock
from lazy_compile.lazy_branch import LazyBranch
from lazy_compile.operators import value_of
from lazy_compile.ops import STATE_NAMES, BranchArms, decision, formula, gate, inline
from lazy_compile.pass_manager import GraphPass
from lazy_compile.program import Program, ProgramInput, Role

aten = torch.ops.aten


@dataclass(frozen=True)
class LiftCacheSlots(GraphPass):
    """A program without hidden state: caches and gates come in, new caches and logits go out.

    ::

        %lazy_step = placeholder            |   %cache_0_0, %gate_weight, %gate_bias = placeholder
        %lazy_branch_0 = lazy_branch_0(     |   %gate_0 = gate_0(%modulated, %gate_weight[0:D], %gate_bias[0])
            %lazy_step, %modulated, %w)     |   %arms_0 = arms_0(%gate_0, %cache_0_0, %modulated, %w)
        %out = getitem(%lazy_branch_0, 0)   |   %out    = getitem(%arms_0, 0)
        return (%y,)                        |   return (%y, getitem(%arms_0, 1), %compute_logits)

    1. Slots are inputs of role SLOT: ``cache_{branch}_{output}``, and with ``reuse="linear"`` also
       ``delta_{branch}_{output}``. The outputs behind the model's own are the next values of all slots, in the
       order of the inputs, then ``compute_logits: float32[rows, G]``.
    2. Linear reuse moves a cache on by a part of its delta. :mod:`lazy_compile.extrapolation` says how, and names the
       slots ``float32[G]`` that keep time.
    3. Inputs of role GATE are one row of a gate table: ``gate_weight: float32[sum of gate_features]`` and
       ``gate_bias: float32[G]``. A bias of +FORCE computes and -FORCE reuses, whatever the gate reads.
    4. A branch takes one decision a call: ``batch_rule`` joins those of the rows, a NaN computes. ``"per_sample"`` is
       lowered as ``"all_reuse"``. A branch whose rows cannot be separated shows its one logit in every row.
    5. A slot starts as :func:`initial_value` says. Nothing here knows a first step: the caller forces it to compute.

    While every branch computes, the model's own outputs are preserved bit for bit.
    """

    reuse: ReuseArm
    batch_rule: BatchRule = "all_reuse"

    def apply(self, program: Program) -> bool:
        calls = _lazy_calls(program)
        if not calls:
            return False
        _remove_step(program)
        inputs = self._add_inputs(program, [call for call, _ in calls])
        scalars: tuple[fx.Node, ...] = ()
        if self.reuse == "linear":
            clock = [inputs[name] for name in CLOCK]
            scalars = (inline(_first_operator(program), formula(list(CLOCK), read_clock), clock), inputs["moved"])
        logits = [self._lift(program, call, lazy, inputs, scalars) for call, lazy in calls]
        self._add_outputs(program, calls, inputs, logits)
        return True

    def _add_inputs(self, program: Program, calls: Sequence[fx.Node]) -> dict[str, fx.Node]:
        """All new placeholders by name."""
        slots: dict[str, Any] = {}
        for index, call in enumerate(calls):
            outputs = value_of(call)
            names = self._slot_names(index, len(outputs))
            slots.update(zip(names, outputs * (len(names) // len(outputs)), strict=True))
        sample = next(iter(slots.values()))
        features = sum(branch.gate_features for branch in program.branches)
        with sample.fake_mode:
            if self.reuse == "linear":
                slots |= {name: _vector(len(calls), sample.device) for name in CLOCK}
            gates = {
                "gate_weight": _vector(features, sample.device),
                "gate_bias": _vector(len(calls), sample.device),
            }
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
    ) -> fx.Node:
        """Replace one lazy branch by its gate and its arms; returns the gate."""
        branch, arguments, module = lazy.branch, call.args[1:], program.graph_module
        start = sum(earlier.gate_features for earlier in program.branches[: branch.index])
        slots = [inputs[name] for name in self._slot_names(branch.index, len(branch.outputs))]
        module.add_submodule(f"gate_{branch.index}", gate(branch))
        module.add_submodule(f"arms_{branch.index}", BranchArms(lazy.body, branch, self.reuse, self.batch_rule))
        module.delete_submodule(str(call.target))
        with program.graph.inserting_before(call):
            weight = aten.slice.Tensor(fx.Proxy(inputs["gate_weight"]), 0, start, start + branch.gate_features)
            bias = aten.select.int(fx.Proxy(inputs["gate_bias"]), 0, branch.index)
            logit = program.graph.call_module(
                f"gate_{branch.index}", (*lazy.entries(arguments), weight.node, bias.node)
            )
            own = [aten.select.int(fx.Proxy(vector), 0, branch.index).node for vector in scalars]
        call.target = f"arms_{branch.index}"
        call.args = (logit, *own, *slots, *arguments)
        return logit

    def _add_outputs(
        self,
        program: Program,
        calls: Sequence[tuple[fx.Node, LazyBranch]],
        inputs: dict[str, fx.Node],
        logits: Sequence[fx.Node],
    ) -> None:
        output = program.graph.output_node()
        state: dict[str, fx.Node] = {}
        with program.graph.inserting_before(output):
            for call, lazy in calls:
                outputs = len(lazy.branch.outputs)
                names = self._slot_names(lazy.branch.index, outputs)
                for position, name in enumerate(names):
                    state[name] = program.graph.call_function(operator.getitem, (call, outputs + position))
                call.meta["val"] = (*value_of(call), *(value_of(inputs[name]) for name in names))
            table = _table(program, logits)
            if self.reuse == "linear":
                program.graph_module.add_submodule(
                    "decide", formula(["logits"], partial(decision, rule=self.batch_rule))
                )
                computes = program.graph.call_module("decide", (table,))
                clock = formula(["computes", *CLOCK], advance_clock)
                times = inline(output, clock, [computes, *(inputs[name] for name in CLOCK)])
                state.update(zip(CLOCK, times, strict=True))
        state["compute_logits"] = table
        output.args = ((*output.args[0], *state.values()),)  # type: ignore[misc]
        output.meta[STATE_NAMES] = tuple(state)
        program.state_outputs = len(state)

    def _slot_names(self, branch: int, outputs: int) -> list[str]:
        kinds = ("cache", "delta") if self.reuse == "linear" else ("cache",)
        return [f"{kind}_{branch}_{position}" for kind in kinds for position in range(outputs)]


def initial_value(slot: str) -> float:
    """What a slot is filled with before the first step of a trajectory."""
    return CLOCK.get(slot, 0.0)


def _lazy_calls(program: Program) -> list[tuple[fx.Node, LazyBranch]]:
    calls = []
    for node in program.graph.find_nodes(op="call_module"):
        module = program.graph_module.get_submodule(str(node.target))
        if isinstance(module, LazyBranch):
            calls.append((node, module))
    return sorted(calls, key=lambda item: item[1].branch.index)


def _first_operator(program: Program) -> fx.Node:
    return program.placeholders[-1].next


def _remove_step(program: Program) -> None:
    position = next(index for index, item in enumerate(program.inputs) if item.role is Role.LAZY_STEP)
    step = program.placeholders[position]
    for user in list(step.users):
        user.args = (None, *user.args[1:])
    program.graph.erase_node(step)
    program.inputs = program.inputs[:position] + program.inputs[position + 1 :]


def _vector(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def _table(program: Program, logits: Sequence[fx.Node]) -> fx.Node:
    """``float32[rows, G]``; a branch that takes one decision for all rows repeats its logit."""
    graph = program.graph
    each = [logit for logit, branch in zip(logits, program.branches, strict=True) if branch.row_separable]
    if each and len(each) < len(logits):
        rows = graph.call_function(aten.sym_size.int, (each[0], 0))
        logits = [item if item in each else graph.call_function(aten.expand.default, (item, [rows])) for item in logits]
    return graph.call_function(aten.stack.default, (list(logits), 1))
