"""One call of a lazy model, placed in its trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lazy_compile.ir.lazy_branch import LazyStep
from lazy_compile.runtime.cache import CacheState
from lazy_compile.runtime.lazy_graph import LazyGraph


@dataclass(frozen=True)
class ModelCall:
    """One call of a lazy model, placed in its trajectory and not yet answered.

    Attributes:
        caches: the slots of this call's stream.
        step: index of the sampler step in its trajectory.
        timestep: the time input, or the step index where the model has none.
        invariants: what the graph takes beside its inputs, see :mod:`lazy_compile.runtime.step_invariants`.
    """

    graph: LazyGraph
    state: Sequence[Tensor]
    tensors: Sequence[Tensor]
    caches: CacheState
    step: int
    timestep: float
    invariants: Sequence[Tensor] = ()

    @property
    def row_inputs(self) -> dict[str, Tensor]:
        """The inputs that have a line for each row of the batch, with the rows on axis 0."""
        axes = self.graph.row_axes
        return {name: self.tensors[index].detach().movedim(axis, 0) for name, (index, axis) in axes.items()}

    def run(self, step: LazyStep) -> Any:
        """The model's own return value, with every branch doing as ``step`` decides."""
        return self.graph.run(self.state, self.tensors, step, self.invariants)

    def for_training(self) -> ModelCall:
        """The same call with tensors that autograd may keep, should a sampler run under inference mode."""
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in self.tensors]
        return replace(self, tensors=tensors)

    def run_flat(self, step: LazyStep) -> list[Tensor]:
        """The tensors of the return value."""
        return [leaf for leaf in pytree.tree_leaves(self.run(step)) if isinstance(leaf, Tensor)]
