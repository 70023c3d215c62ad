"""What branches produced at earlier steps, and the reuse arm that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.runtime.row_matching import match_rows


@dataclass
class CacheSlot:
    """What one branch produced at earlier steps of one stream.

    Attributes:
        values: its latest computed outputs.
        previous: the ones computed before, for linear extrapolation; None until there are any.
        computed_at: ``int64[rows]``, the step at which each row was last computed.
        computed_before: ``int64[rows]``, the step of ``previous``; -1 where there is none.
        signature: the branch, and the types of its entries and outputs: only a call that agrees may reuse it.
    """

    values: tuple[Tensor, ...]
    previous: tuple[Tensor, ...] | None
    computed_at: npt.NDArray[np.int64]
    computed_before: npt.NDArray[np.int64]
    signature: tuple[Any, ...]

    def of_rows(self, rows: tuple[int, ...], branch: ResidualBranch) -> CacheSlot:
        """What it holds for some rows, in their order."""
        index = torch.tensor(rows, device=self.values[0].device)

        def pick(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            axes = [output.batch_axis or 0 for output in branch.outputs]
            return tuple(value.index_select(axis, index) for value, axis in zip(values, axes, strict=True))

        return CacheSlot(
            pick(self.values),
            self.previous and pick(self.previous),
            self.computed_at[list(rows)],
            self.computed_before[list(rows)],
            (*self.signature[:-1], len(rows)),
        )

    @property
    def bytes(self) -> int:
        tensors = self.values + (self.previous or ())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class CacheState:
    """All slots of one stream: one trajectory of the conditional, the unconditional, or another request's batch.

    Attributes:
        memory: what policies keep.
        timestep_before: the time input at the step before; None at the first.
        inputs: those of the last call that have a line for each row, with the rows on axis 0.
    """

    slots: dict[int, CacheSlot] = field(default_factory=dict)
    memory: dict[str, object] = field(default_factory=dict)
    timestep_before: float | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def follow_rows(self, inputs: dict[str, Tensor], branches: Sequence[ResidualBranch]) -> str:
        """Let the rows of a batch of another size go on as those with the same conditions; what was done, in words."""
        before, self.inputs = self.inputs, inputs
        sizes = [len(next(iter(each.values()), ())) for each in (before, inputs)]
        if 0 in sizes or sizes[0] == sizes[1]:
            return ""
        self.memory.clear()
        rows = match_rows(before, inputs)
        if rows is None:
            self.slots.clear()
            return f"from {sizes[0]} rows to {sizes[1]}: conditions do not say which go on, so every branch computes"
        before_it = self.slots
        self.slots = {
            branch.index: slot.of_rows(rows, branch)
            for branch in branches
            if branch.row_separable and (slot := before_it.get(branch.index)) and slot.signature[0] == branch.name
        }
        return f"from {sizes[0]} rows to {sizes[1]}, which go on as the rows {', '.join(map(str, rows))} before"

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in self.slots.values())


def extrapolate(value: Tensor, previous: Tensor, factors: npt.NDArray[np.float64], batch_axis: int | None) -> Tensor:
    """``value + factor * (value - previous)``, one factor for each row; numbers that only count are repeated."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    if (factors == factors[0]).all() or batch_axis is None:
        return torch.lerp(value, previous, -float(factors[0])) if factors[0] else value
    shape = [1] * value.dim()
    shape[batch_axis] = len(factors)
    factor = torch.from_numpy(factors).to(value.device, value.dtype).reshape(shape)
    return torch.lerp(value, previous, -factor)


def _usable(tensor: Tensor) -> Tensor:
    """A tensor that was cached under inference mode takes no part in autograd; outside that mode a copy does."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
