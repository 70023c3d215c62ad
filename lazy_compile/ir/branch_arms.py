"""What lifted and lowered programs are made of: the select operator, and the arms of a branch as small ATen graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lazy_compile.config import ReuseArm
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.linear_reuse import SCALARS, moved_on, new_deltas
from lazy_compile.ir.program import Program

aten = torch.ops.aten

STATE_NAMES = "state_names"
"""``output_node.meta[STATE_NAMES]`` names the trailing outputs of a lifted program: slots, then ``compute_logits``."""

DECISIONS = "decisions"
"""The submodule of a lifted program that gathers what all gates decided, for the clock of linear reuse."""


@torch.library.custom_op("lazy_compile::select", mutates_args=())
def select(should_compute: Tensor, computed: Tensor, reused: Tensor, conditional: int) -> Tensor:
    """``computed`` if ``should_compute: bool[]`` holds, else ``reused``; both have one shape and dtype.

    In a graph for an engine all selects of one number stand for one conditional, named by the index of its first
    branch: what only ``computed`` needs may be skipped.
    """
    return torch.where(should_compute, computed, reused).contiguous()


@select.register_fake
def _(should_compute: Tensor, computed: Tensor, reused: Tensor, conditional: int) -> Tensor:
    return computed.new_empty(computed.shape)


class BranchArms(nn.Module):
    """Both arms of a branch: the eager reference for engines, which replace it by a conditional.

    The state of a branch is its slots: ``cache`` for each output, and for linear reuse the :data:`SCALARS` of
    :mod:`lazy_compile.ir.linear_reuse`, then ``cache`` and ``delta`` for each output.

    Attributes:
        body: ``inputs -> outputs``.
        reuse: ``state -> outputs``, which are also the next caches.
        renew: ``(*state, *outputs) -> next deltas`` of a branch that computes; None unless reuse is linear.
        outputs: how many outputs the branch has.
    """

    def __init__(self, body: fx.GraphModule, branch: ResidualBranch, reuse: ReuseArm) -> None:
        super().__init__()
        self.outputs = len(branch.outputs)
        self.body = body
        positions = range(self.outputs)
        caches = [f"cache_{position}" for position in positions]
        if reuse == "last":
            self.reuse = formula(caches, lambda *state: state)
            self.renew = None
            return
        state = [*SCALARS, *caches, *(f"delta_{position}" for position in positions)]
        dtypes = [getattr(torch, output.dtype) for output in branch.outputs]
        self.reuse = formula(state, lambda *state: moved_on(*self._parts(state), dtypes))
        self.renew = formula(
            [*state, *(f"output_{position}" for position in positions)],
            lambda *given: new_deltas(*self._parts(given[: len(state)]), given[len(state) :], dtypes),
        )

    def forward(self, should_compute: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """From ``(should_compute: bool[], *state, *inputs)`` to ``(*outputs, *next_cache, [*next_delta])``."""
        state, inputs = self.split(arguments)
        if should_compute:
            outputs = tuple(self.body(*inputs))
            return (*outputs, *outputs, *(self.renew(*state, *outputs) if self.renew else ()))
        outputs = tuple(self.reuse(*state))
        return (*outputs, *outputs, *self.deltas(state))

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What ``reuse`` takes, and what ``body`` takes."""
        count = len(SCALARS) + 2 * self.outputs if self.renew else self.outputs
        return arguments[:count], arguments[count:]

    def deltas(self, state: Sequence[Any]) -> Sequence[Any]:
        """The slots that reuse leaves as they are."""
        return self._parts(state)[2] if self.renew else ()

    def _parts(self, state: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        slots = state[len(SCALARS) :]
        return state[: len(SCALARS)], slots[: self.outputs], slots[self.outputs :]


def formula(names: Sequence[str], function: Callable[..., Any]) -> fx.GraphModule:
    """The graph of a function that calls ATen operators on its arguments, which are named ``names``."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    result = function(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(tuple(item.node for item in result) if isinstance(result, tuple) else result.node)
    return fx.GraphModule({}, graph)


def inline(before: fx.Node, body: fx.GraphModule, arguments: Sequence[Any], **meta: Any) -> Any:
    """Copy the nodes of ``body`` in front of a node, its inputs replaced by ``arguments``; returns its output."""
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
    with before.graph.inserting_before(before):
        output = before.graph.graph_copy(body.graph, copies)
    for node in body.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node].meta.update(meta)
    return output


def replace_results(call: fx.Node, results: Sequence[fx.Node]) -> None:
    """Put ``results`` in the place of a call that returns a tuple."""
    for user in list(call.users):
        assert user.target is operator.getitem
        result = results[user.args[1]]  # type: ignore[index]
        result.meta.setdefault("val", user.meta.get("val"))
        user.replace_all_uses_with(result)
        call.graph.erase_node(user)
    call.graph.erase_node(call)


def state_names(program: Program) -> tuple[str, ...]:
    """Names of the trailing ``program.state_outputs`` outputs, in order."""
    names: tuple[str, ...] = program.graph.output_node().meta[STATE_NAMES]
    return names
