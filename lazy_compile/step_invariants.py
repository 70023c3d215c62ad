"""What need not be computed again within a trajectory, because the inputs that it depends on stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lazy_compile.lazy_graph import LazyGraph
from lazy_compile.runtime import CacheState

Hoist = Callable[[LazyGraph, frozenset[str]], LazyGraph]
"""A graph that takes apart what the inputs of these names decide; the same graph if that saves nothing."""


class Seen:
    """A tensor as it was at a call."""

    def __init__(self, tensor: Tensor) -> None:
        self._version = None if _is_borrowed(tensor) else _version(tensor)
        self._tensor = tensor.clone() if self._version is None else tensor

    def equals(self, tensor: Tensor) -> bool:
        """Whether it has the same values; those of a tensor that was written to since are not known."""
        if self._version is not None and _version(self._tensor) != self._version:
            return False
        if tensor is self._tensor or tensor.is_meta:
            return tensor is self._tensor
        return _kind(tensor) == _kind(self._tensor) and torch.equal(tensor, self._tensor)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _is_borrowed(tensor: Tensor) -> bool:
    """Whether it lies in memory of something else, such as an array, which may write there without being counted."""
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return False
    return not tensor.untyped_storage().resizable()


def _version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None under inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


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
    seen: list[Seen]
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
            self.weights, self.seen = weights, [Seen(tensor) for tensor in tensors]
        return self.graph, self.values


def follow(
    graph: LazyGraph, state: Sequence[Tensor], tensors: Sequence[Tensor], caches: CacheState, hoist: Hoist
) -> tuple[LazyGraph, tuple[Tensor, ...]]:
    """The graph that a call of a stream runs on, and what it takes beside weights and inputs.

    Args:
        graph: what the call was captured as.
        state: its weights, buffers and constants.
        tensors: its inputs.
        caches: of the stream.
        hoist: makes the graph of the second call.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*state, *tensors)):
        return graph, ()  # gradients flow to the weights at every call
    if caches.invariants is None or caches.invariants.base is not graph:
        caches.invariants = StepInvariants(graph, [Seen(tensor) for tensor in tensors])
        return graph, ()
    return caches.invariants.advance(state, tensors, hoist)
