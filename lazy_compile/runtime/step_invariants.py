"""What need not be computed again within a trajectory, because the inputs that it depends on stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lazy_compile.runtime.lazy_graph import LazyGraph
from lazy_compile.runtime.tensor_snapshot import TensorSnapshot, _version

Hoist = Callable[[LazyGraph, frozenset[str]], LazyGraph]
"""A graph that takes apart what the inputs of these names decide; the same graph if that saves nothing."""


@dataclass
class StepInvariants:
    """The inputs of one stream that stayed the same from its first call to its second, and what follows from them.

    Nothing is assumed of an input for its name or kind: two calls tell which ones stay. One that changes later is
    noticed, since all of them are compared at every call, and what depends on them is computed again.

    Attributes:
        base: the graph of the first call.
        seen: its inputs; later those that ``values`` were computed from.
        graph: what later calls run on; None before the second.
        weights: the weights that ``values`` were computed with.
        values: of the inputs of role INVARIANT.
    """

    base: LazyGraph
    seen: list[TensorSnapshot]
    graph: LazyGraph | None = None
    positions: tuple[int, ...] = ()
    weights: tuple[Any, ...] = ()
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
        weights = tuple((id(weight), _version(weight)) for weight in state)
        stale = weights != self.weights or not all(self.seen[item].equals(tensors[item]) for item in self.positions)
        if stale:
            assert self.graph.program.prologue is not None
            self.values = self.graph.program.prologue(*state, *tensors)
            self.weights, self.seen = weights, [TensorSnapshot(tensor) for tensor in tensors]
        return self.graph, self.values


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
        return StepInvariants(graph, [TensorSnapshot(tensor) for tensor in tensors]), graph, ()
    return known, *known.advance(state, tensors, hoist)
