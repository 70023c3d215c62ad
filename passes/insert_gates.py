"""Put a gate and a cache around every outlined branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lazy_compile.analysis.batch_rows import batch_axis, batch_symbol
from lazy_compile.ir.lazy_branch import TAG, LazyBranch
from lazy_compile.ir.operators import operator_name, origins, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, ProgramInput, Role


@dataclass(frozen=True)
class InsertGates(GraphPass):
    """Every branch asks the denoising step, a new input of the graph, whether it computes or reuses.

    ::

        %branch_0 = branch_0(%modulated, %w_q, ...)      |   %lazy_step = placeholder
                                                         |   %lazy_branch_0 = lazy_branch_0(%lazy_step, %modulated, ...)

    1. The step is passed explicitly, so that the graph holds no state: threads, streams and calibration differ only in
       the step that they pass.
    2. A branch without an entry has nothing that a gate could read; discovery never yields one.
    3. An output of the model that is an output of a branch, or a view of one, is copied: the caller may write to it,
       and the cache must not change.

    Numerics are preserved bit for bit while every branch computes.
    """

    def apply(self, program: Program) -> bool:
        calls = [node for node in program.graph.find_nodes(op="call_module") if str(node.target).startswith("branch_")]
        if not calls:
            return False
        symbol = batch_symbol(program)
        with program.graph.inserting_after(program.placeholders[-1]):
            step = program.graph.placeholder(Role.LAZY_STEP.value)
        program.inputs = (*program.inputs, ProgramInput(Role.LAZY_STEP, step.name))
        for call in calls:
            branch = program.branches[call.meta[TAG]]
            body = program.graph_module.get_submodule(str(call.target))
            assert isinstance(body, fx.GraphModule)
            values = [value_of(node) for node in body.graph.find_nodes(op="placeholder")]
            axes = tuple(batch_axis(value, symbol) if isinstance(value, Tensor) else None for value in values)
            name = f"lazy_branch_{branch.index}"
            program.graph_module.add_submodule(name, LazyBranch(body, branch, axes))
            program.graph_module.delete_submodule(str(call.target))
            call.target = name
            call.args = (step, *call.args)
        _copy_what_is_returned(program.graph, set(calls))
        return True


def _copy_what_is_returned(graph: fx.Graph, branches: set[fx.Node]) -> None:
    output = graph.output_node()
    for node in output.all_input_nodes:
        if any(origin.args[0] in branches for origin in origins(node) if operator_name(origin) == "getitem"):
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            output.replace_input_with(node, copy)
