"""What lifted and lowered programs are made of: the select operator, and the arms of a branch as small ATen graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.extrapolation import moved_on, new_difference
from lazy_compile.ir.program import Program

aten = torch.ops.aten

STATE_NAMES = "state_names"
"""``output_node.meta[STATE_NAMES]`` names the trailing outputs of a lifted program: slots, then ``compute_logits``."""

DECISIONS = "decisions"
"""The submodule of a lifted program that gathers what all gates decided, for the clock of extrapolation."""


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

    The state of a branch of order n is, see :mod:`lazy_compile.ir.extrapolation`: by how many of each of n differences
    its caches move if it is reused now, and by how many they were moved before; then its slots, ``cache`` for each
    output, ``delta`` for each, and so on.

    Attributes:
        body: ``inputs -> outputs``.
        move: ``state -> next caches`` of a branch that is reused.
        restore: ``(*caches, *bases) -> outputs`` of one that is reused; None if the caches are the outputs.
        keep: ``(*outputs, *bases) -> next caches`` of one that computes; None likewise.
        renew: ``(*state, *next caches) -> next deltas`` of one that computes; None for order 0.
        outputs: how many outputs the branch has.
        order: of the extrapolation.
    """

    def __init__(self, body: fx.GraphModule, branch: ResidualBranch, order: int) -> None:
        super().__init__()
        self.outputs, self.order = len(branch.outputs), order
        self.body = body
        inputs = [node.name for node in body.graph.find_nodes(op="placeholder")]
        self._bases = [inputs.index(output.relative_to) for output in branch.outputs if output.relative_to is not None]
        dtypes = [getattr(torch, output.dtype) for output in branch.outputs]
        relative = [output.relative_to is not None for output in branch.outputs]
        caches = [f"cache_{position}" for position in range(self.outputs)]
        state = [f"scalar_{position}" for position in range(2 * order)]
        state += caches + [f"delta_{position}" for position in range(order * self.outputs)]
        self.move = formula(state, lambda *state: self._moved(state, dtypes))
        self.renew = formula(
            [*state, *(f"next_{name}" for name in caches)], lambda *given: self._renewed(given, dtypes)
        )
        self.restore = self.keep = None
        if self._bases:
            names = [*caches, *(f"base_{position}" for position in range(len(self._bases)))]
            self.restore = formula(names, lambda *given: self._with_bases(aten.add.Tensor, given, relative))
            self.keep = formula(names, lambda *given: self._with_bases(aten.sub.Tensor, given, relative))

    def forward(self, should_compute: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """From ``(should_compute: bool[], *state, *inputs)`` to ``(*outputs, *next_caches, *next_deltas)``."""
        state, inputs = self.split(arguments)
        if not should_compute:
            caches = tuple(self.move(*state))
            outputs = caches if self.restore is None else tuple(self.restore(*caches, *self.bases(inputs)))
            return (*outputs, *caches, *self.deltas(state))
        outputs = tuple(self.body(*inputs))
        caches = outputs if self.keep is None else tuple(self.keep(*outputs, *self.bases(inputs)))
        return (*outputs, *caches, *self.renew(*state, *caches))

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What is kept of the branch, and what ``body`` takes."""
        count = 2 * self.order + (1 + self.order) * self.outputs
        return arguments[:count], arguments[count:]

    def bases(self, inputs: Sequence[Any]) -> list[Any]:
        """Of the inputs of the body those that outputs are relative to."""
        return [inputs[position] for position in self._bases]

    def deltas(self, state: Sequence[Any]) -> Sequence[Any]:
        """The slots that reuse leaves as they are."""
        return state[2 * self.order + self.outputs :]

    def _differences(self, state: Sequence[Any], output: int) -> Sequence[Any]:
        return self.deltas(state)[output :: self.outputs]

    def _moved(self, state: Sequence[Any], dtypes: Sequence[torch.dtype]) -> tuple[Any, ...]:
        shifts, caches = state[: self.order], state[2 * self.order :][: self.outputs]
        return tuple(
            moved_on(cache, self._differences(state, position), shifts, dtype)
            for position, (cache, dtype) in enumerate(zip(caches, dtypes, strict=True))
        )

    def _renewed(self, given: Sequence[Any], dtypes: Sequence[torch.dtype]) -> tuple[Any, ...]:
        state, values = given[: -self.outputs], given[-self.outputs :]
        moved, caches = state[self.order : 2 * self.order], state[2 * self.order :][: self.outputs]
        if not self.order:
            return ()
        first = tuple(
            new_difference(value, cache, self._differences(state, position), moved, dtype)
            for position, (value, cache, dtype) in enumerate(zip(values, caches, dtypes, strict=True))
        )
        return (*first, *self.deltas(state)[: (self.order - 1) * self.outputs])

    def _with_bases(self, operator: Any, given: Sequence[Any], relative: Sequence[bool]) -> tuple[Any, ...]:
        values, bases = given[: self.outputs], iter(given[self.outputs :])
        return tuple(
            operator(*((next(bases), value) if operator is aten.add.Tensor else (value, next(bases)))) if has else value
            for value, has in zip(values, relative, strict=True)
        )


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
