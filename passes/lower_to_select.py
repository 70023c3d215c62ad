"""Make a lifted program one flat graph, in which a branch is its body and a select for each of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lazy_compile.ir.branch_arms import BranchArms, inline, replace_results
from lazy_compile.ir.lazy_branch import TAG
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program


@dataclass(frozen=True)
class LowerToSelect(GraphPass):
    """Inline gates and both arms of every branch.

    ::

        %gate_0   = gate_0(%modulated, %w, %b)           |   %logit   = ... mul, sum, add
        %decide_0 = decide_0(%gate_0)                    |   %compute = ... le, amin, lt                bool[]
        %arms_0   = arms_0(%decide_0, %cache_0_0, ...)   |   %o       = linear(...)                     [branch 0]
        %out      = getitem(%arms_0, 0)                  |   %out     = select(%compute, %o, %cache_0_0, 0)
        %next     = getitem(%arms_0, 1)                  |

    1. Both arms run here; an engine makes one conditional of the selects of a branch, and moves into it what only they
       need. Nothing else in the graph tells it where a branch begins, so this holds for whatever the engine fuses.
    2. Nodes of a body carry the index of their branch, ``node.meta["lazy_branch"]``.
    3. The next cache is the branch's output itself: one select serves both. Where an output is relative to an input,
       the cache has a select of its own.

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
    index, condition = call.meta[TAG], call.args[0]
    state, inputs = arms.split(call.args[1:])
    computed = inline(call, arms.body, inputs, **{TAG: index})
    bases = arms.bases(inputs)
    kept = inline(call, arms.keep, [*computed, *bases], **{TAG: index}) if arms.keep else computed
    renewed = inline(call, arms.renew, [*state, *kept])
    moved = inline(call, arms.move, state)
    restored = inline(call, arms.restore, [*moved, *bases]) if arms.restore else moved

    def chosen(computing: Sequence[fx.Node], reusing: Sequence[fx.Node]) -> list[fx.Node]:
        with call.graph.inserting_before(call):
            return [
                call.graph.call_function(torch.ops.lazy_compile.select.default, (condition, *pair, index))
                for pair in zip(computing, reusing, strict=True)
            ]

    caches = chosen(kept, moved)
    outputs = [
        cache if one is other else chosen([one], [restored[position]])[0]
        for position, (one, other, cache) in enumerate(zip(computed, kept, caches, strict=True))
    ]
    replace_results(call, [*outputs, *caches, *chosen(renewed, arms.deltas(state))])
