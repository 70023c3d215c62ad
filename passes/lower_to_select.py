"""Make a lifted program one flat graph, in which a branch is its body and a select for each of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lazy_compile.lazy_branch import TAG
from lazy_compile.ops import BranchArms, inline, replace_results
from lazy_compile.pass_manager import GraphPass
from lazy_compile.program import Program


@dataclass(frozen=True)
class LowerToSelect(GraphPass):
    """Inline gates and both arms of every branch.

    ::

        %gate_0 = gate_0(%modulated, %w, %b)             |   %logit   = ... mul, sum, add
        %arms_0 = arms_0(%gate_0, %cache_0_0, ...)       |   %compute = ... le, amin, lt                bool[]
        %out    = getitem(%arms_0, 0)                    |   %o       = linear(...)                     [branch 0]
        %next   = getitem(%arms_0, 1)                    |   %out     = select(%compute, %o, %cache_0_0, 0)

    1. Both arms run here; an engine makes one conditional of the selects of a branch, and moves into it what only they
       need. Nothing else in the graph tells it where a branch begins, so this holds for whatever the engine fuses.
    2. Nodes of a body carry the index of their branch, ``node.meta["lazy_branch"]``.
    3. The cache of ``reuse="last"`` is the branch's output itself: one select serves both.

    Numerics are preserved bit for bit.
    """

    def apply(self, program: Program) -> bool:
        modules = dict(program.graph_module.named_children())
        calls = list(program.graph.find_nodes(op="call_module"))
        if not any(isinstance(modules[str(call.target)], BranchArms) for call in calls):
            return False
        for call in calls:
            module = modules[str(call.target)]
            if isinstance(module, BranchArms):
                _lower(call, module)
            else:
                assert isinstance(module, fx.GraphModule)
                call.replace_all_uses_with(inline(call, module, call.args))
                program.graph.erase_node(call)
        program.graph_module.delete_all_unused_submodules()
        return True


def _lower(call: fx.Node, arms: BranchArms) -> None:
    index, logit = call.meta[TAG], call.args[0]
    slots, inputs = arms.split(call.args[1:])
    cache, previous = arms.cache_and_previous(slots)
    condition = inline(call, arms.decide, [logit])
    computed = inline(call, arms.body, inputs, **{TAG: index})
    reused = inline(call, arms.reuse, slots)

    def select(then: Sequence[fx.Node], otherwise: Sequence[fx.Node]) -> list[fx.Node]:
        with call.graph.inserting_before(call):
            return [
                call.graph.call_function(torch.ops.lazy_compile.select.default, (condition, *pair, index))
                for pair in zip(then, otherwise, strict=True)
            ]

    outputs = select(computed, reused)
    states = select(computed, cache) + select(cache, previous) if arms.linear else outputs
    replace_results(call, outputs + states)
