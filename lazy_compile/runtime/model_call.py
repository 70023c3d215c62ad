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
from lazy_compile.runtime.placed_call import Placed


@dataclass(frozen=True)
class RowGroup:
    """Rows of a call that stand at one step of their trajectories.

    Attributes:
        rows: their indices; None for all rows of the call.
        step: which call of their trajectories they make, from 0.
        timestep: their time input, or the step where the model has none.
        before: that of the step before; None at the first.
    """

    rows: tuple[int, ...] | None
    step: int
    timestep: float
    before: float | None


def groups_of(placed: Placed) -> tuple[RowGroup, ...]:
    """The rows of a placed call by where they stand, the latest step first."""
    standing: dict[tuple[int, float | None, float | None], list[int]] = {}
    for row, key in enumerate(zip(placed.steps.tolist(), placed.times, placed.before, strict=True)):
        standing.setdefault(key, []).append(row)
    return tuple(
        RowGroup(None if len(standing) == 1 else tuple(rows), step, float(step) if time is None else time, before)
        for (step, time, before), rows in sorted(standing.items(), key=lambda item: -item[0][0])
    )


@dataclass(frozen=True)
class ModelCall:
    """One call of a lazy model, placed in its trajectory and not yet answered.

    Attributes:
        caches: the slots of the rows of this call; the same object along a stream.
        step: which call of its trajectory this is, from 0; the latest, should rows differ.
        timestep: the time input of that row, or the step where the model has none.
        groups: rows that stand at one step of their trajectories.
        invariants: what the graph takes beside its inputs, see :mod:`lazy_compile.runtime.step_invariants`.
    """

    graph: LazyGraph
    state: Sequence[Tensor]
    tensors: Sequence[Tensor]
    caches: CacheState
    step: int
    timestep: float
    groups: tuple[RowGroup, ...] = ()
    invariants: Sequence[Tensor] = ()

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
