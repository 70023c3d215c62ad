"""Which node depends on which, as bit sets over the node order: after one pass, each question is one AND."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from lazy_compile.ir.operators import SHAPE_ONLY, operator_name, value_of


class Dataflow:
    """Reachability of one graph, fixed at construction.

    A set of nodes is an ``int`` whose bit ``k`` stands for the ``k``-th node of the graph. Ancestors and descendants
    follow every edge, which is what decides on the order of nodes; regions follow values alone, and not what is only
    as large as another tensor.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: position for position, node in enumerate(self.nodes)}
        self._ancestors = [0] * len(self.nodes)
        self._descendants = [0] * len(self.nodes)
        self._informs = [0] * len(self.nodes)
        self._informed_by = [0] * len(self.nodes)
        for position, node in enumerate(self.nodes):
            reached = 1 << position
            for argument in node.all_input_nodes:
                reached |= self._ancestors[self.position[argument]]
            self._ancestors[position] = reached
            informed = 1 << position
            for argument in _read_for_their_values(node):
                informed |= self._informed_by[self.position[argument]]
            self._informed_by[position] = informed
        for position in reversed(range(len(self.nodes))):
            reached = 1 << position
            for user in self.nodes[position].users:
                reached |= self._descendants[self.position[user]]
            self._descendants[position] = reached
            self._informs[position] |= 1 << position
            for argument in _read_for_their_values(self.nodes[position]):
                self._informs[self.position[argument]] |= self._informs[position]

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        result = 0
        for node in nodes:
            result |= 1 << self.position[node]
        return result

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a set, in graph order."""
        while bits:
            lowest = bits & -bits
            yield self.nodes[lowest.bit_length() - 1]
            bits ^= lowest

    def ancestors(self, node: fx.Node) -> int:
        """Everything that ``node`` depends on, itself included."""
        return self._ancestors[self.position[node]]

    def descendants(self, node: fx.Node) -> int:
        """Everything that depends on ``node``, itself included."""
        return self._descendants[self.position[node]]

    def informed(self, node: fx.Node) -> int:
        """Everything whose values depend on those of ``node``, itself included."""
        return self._informs[self.position[node]]

    def informed_by(self, node: fx.Node) -> int:
        """Everything whose values those of ``node`` depend on, itself included."""
        return self._informed_by[self.position[node]]

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.ancestors(node) >> self.position[on] & 1)

    def region(self, source: fx.Node, sink: fx.Node) -> int:
        """Every node on a path of values from ``source`` to ``sink``, the source left out; empty if there is none."""
        start, end = self.position[source], self.position[sink]
        return (self._informs[start] ^ (1 << start)) & self._informed_by[end]

    def hull(self, bits: int) -> int:
        """The smallest set around ``bits`` that holds every node between two of its members."""
        above = below = 0
        for node in self.members(bits):
            above |= self.ancestors(node)
            below |= self.descendants(node)
        return above & below


def _read_for_their_values(node: fx.Node) -> list[fx.Node]:
    if operator_name(node) in SHAPE_ONLY or isinstance(value_of(node), torch.SymInt):
        return []
    return [argument for argument in node.all_input_nodes if not isinstance(value_of(argument), torch.SymInt)]
