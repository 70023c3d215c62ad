"""What need not be computed again within a trajectory, because the inputs that it depends on stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lazy_compile.runtime.lazy_graph import LazyGraph
from lazy_compile.runtime.tensor_snapshot import TensorSnapshot, WeightSnapshot

Hoist = Callable[[LazyGraph, frozenset[str]], LazyGraph]
"""A graph that takes apart what the inputs of these names decide; the same graph if that saves nothing."""


@dataclass
class StepInvariants:
    """The inputs of one stream that stayed the same from its first call to its second, and what follows from them.

    Nothing is assumed of an input for its name or kind: two calls tell which ones stay. One that changes later is
    noticed, since all of them are compared at every call, and what depends on them is computed again.

    Attributes:
        base: the graph of the first call.
        seen: its inputs by position; later those that ``values`` were computed from.
        graph: what later calls run on; None before the second.
        weights: those that ``values`` were computed with; None before.
        values: of the inputs of role INVARIANT.
    """

    base: LazyGraph
    seen: Mapping[int, TensorSnapshot]
    graph: LazyGraph | None = None
    positions: tuple[int, ...] = ()
    weights: WeightSnapshot | None = None
    values: tuple[Tensor, ...] = field(default=())

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.values)

    def advance(
        self, state: Sequence[Tensor], tensors: Sequence[Tensor], hoist: Hoist
    ) -> tuple[LazyGraph, tuple[Tensor, ...]]:
        """The graph that a later call runs on, and the values that it takes beside the inputs."""
        if self.graph is None:
            kept = [position for position, tensor in enumerate(tensors) if self.seen[position].equals(tensor)]
            self.positions = tuple(position for position in kept if position != self.base.timestep_position)
            self.graph = hoist(self.base, frozenset(self.base.layout.names[position] for position in self.positions))
        if self.graph is self.base:
            return self.base, ()
        prologue = self.graph.program.prologue
        assert prologue is not None
        weights = [state[position] for position in _read_by(prologue, len(state))]
        known = self.weights is not None and self.weights.equals(weights)
        if not known or not all(self.seen[item].equals(tensors[item]) for item in self.positions):
            self.values = prologue(*state, *tensors)
            self.weights = WeightSnapshot(weights)
            self.seen = {item: TensorSnapshot(tensors[item]) for item in self.positions}
        return self.graph, self.values


def _read_by(prologue: fx.GraphModule, weights: int) -> list[int]:
    """Which of the weights, the first inputs of a prologue, it reads."""
    inputs = prologue.graph.find_nodes(op="placeholder")
    return [position for position, node in enumerate(inputs[:weights]) if node.users]


def follow(
    known: StepInvariants | None, graph: LazyGraph, state: Sequence[Tensor], tensors: Sequence[Tensor], hoist: Hoist
) -> tuple[StepInvariants | None, LazyGraph, tuple[Tensor, ...]]:
    """What a stream knows after a call, the graph that the call runs on, and what it takes beside weights and inputs.

    Args:
        known: what the stream knew before.
        graph: what the call was captured as.
        state: its weights, buffers and constants.
        tensors: its inputs.
        hoist: makes the graph of the second call.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*state, *tensors)):
        return known, graph, ()  # gradients flow to the weights at every call
    if known is None or known.base is not graph:
        return StepInvariants(graph, dict(enumerate(map(TensorSnapshot, tensors)))), graph, ()
    return known, *known.advance(state, tensors, hoist)
