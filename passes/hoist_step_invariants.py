"""Take out of a graph what stays the same along a trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from lazy_compile.analysis.dataflow import Dataflow
from lazy_compile.ir.operators import VIEWS, is_heavy, is_random, operator_name, origins, value_of
from lazy_compile.ir.pass_manager import GraphPass
from lazy_compile.ir.program import Program, ProgramInput, Role, erase_dead


@dataclass(frozen=True)
class HoistStepInvariants(GraphPass):
    """A second graph, the prologue, for what the values of ``inputs`` and the weights alone decide.

    ::

        %text, %sample, %w_k, %w_q = placeholder         |   %text, %sample, ..., %invariant_0 = placeholder
        %k = aten.linear(%text, %w_k)                    |   %q = aten.linear(%sample, %w_q)
        %q = aten.linear(%sample, %w_q)                  |   %a = sdpa(%q, view(%invariant_0), ...)
        %a = sdpa(%q, view(%k), ...)                     |
                                                         |   prologue: (%text, ..., %w_k) -> aten.linear(%text, %w_k)

    1. The prologue takes the inputs that the program had before, in the same order; its results are new inputs of role
       INVARIANT behind them. Both graphs may read how large any input is.
    2. Each result saves a matrix product or a convolution. What follows from another result without one stays, and so
       do views: it is cheap, and a branch still reads its skip connection through its norm.
    3. A size may be that of a tensor that changes if that is an input.
    4. What depends on weights alone stays: a copy of the weights in another type would be kept. So does what the caller
       receives, and what is random.

    Numerics are preserved bit for bit.

    Attributes:
        inputs: names of the user's inputs whose values do not change from step to step.
    """

    inputs: frozenset[str] = frozenset()

    def apply(self, program: Program) -> bool:
        if not self.inputs:
            return False
        flow = Dataflow(program.graph)
        varying, conditioned, weighted = self._informed(program, flow)
        returned = {origin for node in program.graph.output_node().all_input_nodes for origin in origins(node)}

        def is_invariant(node: fx.Node) -> bool:
            bit = 1 << flow.position[node]
            return (
                node.op == "call_function"
                and isinstance(value_of(node), Tensor)
                and node not in returned
                and not varying & bit
                and bool(conditioned & bit or not weighted & bit)
                and all(member.op == "placeholder" for member in flow.members(flow.ancestors(node) & varying))
            )

        invariant = set(filter(is_invariant, program.graph.nodes))
        border = {_before_views(node) for node in invariant if not invariant.issuperset(node.users)} & invariant
        results = _worth_keeping(flow, sorted(border, key=flow.position.__getitem__))
        if not results:
            return False
        program.prologue = _prologue(program, flow, results)
        for index, node in enumerate(results):
            with program.graph.inserting_after(program.placeholders[-1]):
                given = program.graph.placeholder(f"invariant_{index}")
            given.meta = dict(node.meta)
            program.inputs += (ProgramInput(Role.INVARIANT, given.name),)
            node.replace_all_uses_with(given)
        erase_dead(program.graph)
        return True

    def _informed(self, program: Program, flow: Dataflow) -> tuple[int, int, int]:
        """What the values of changing inputs, of ``inputs``, and of weights have an influence on."""
        varying = conditioned = weighted = 0
        for item, node in zip(program.inputs, program.placeholders, strict=True):
            if item.role is Role.USER and item.name in self.inputs:
                conditioned |= flow.informed(node)
            elif item.role is Role.PARAMETER:
                weighted |= flow.informed(node)
            elif item.role not in (Role.BUFFER, Role.CONSTANT):
                varying |= flow.informed(node)
        for node in program.graph.nodes:
            if is_random(node):
                varying |= flow.informed(node)
        return varying, conditioned, weighted


def _worth_keeping(flow: Dataflow, candidates: list[fx.Node]) -> list[fx.Node]:
    """Those that need a heavy operator which no earlier one among their ancestors has done already."""
    kept: list[fx.Node] = []
    for node in candidates:
        needed = flow.ancestors(node)
        for earlier in kept:
            if flow.depends(node, on=earlier):
                needed &= ~flow.ancestors(earlier)
        if any(map(is_heavy, flow.members(needed))):
            kept.append(node)
    return kept


_LAID_OUT = VIEWS | {"expand", "slice", "select", "alias", "detach"}


def _before_views(node: fx.Node) -> fx.Node:
    """What a node shows in another way, as far back as that is an operator's result."""
    while operator_name(node) in _LAID_OUT and isinstance(source := node.args[0], fx.Node):
        if source.op != "call_function" or not isinstance(value_of(source), Tensor):
            break
        node = source
    return node


def _prologue(program: Program, flow: Dataflow, results: list[fx.Node]) -> fx.GraphModule:
    needed = 0
    for node in results:
        needed |= flow.ancestors(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in _in_order(program, flow, needed):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule({}, graph)


def _in_order(program: Program, flow: Dataflow, needed: int) -> Iterator[fx.Node]:
    """All placeholders, and the other nodes that are needed."""
    yield from program.placeholders
    yield from (node for node in flow.members(needed) if node.op != "placeholder")
