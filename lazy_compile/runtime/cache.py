"""What branches produced at earlier steps, and the reuse arm that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.ir.branch import ResidualBranch


@dataclass(frozen=True)
class CacheSlot:
    """What one branch produced at earlier steps of some rows. Never written to: a step that computes makes another.

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

    def of_rows(self, rows: Sequence[int], branch: ResidualBranch) -> CacheSlot:
        """What it holds for some rows, in their order."""
        index = torch.tensor(rows, device=self.values[0].device)
        axes = _row_axes(branch)

        def pick(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(value.index_select(axis, index) for value, axis in zip(values, axes, strict=True))

        return CacheSlot(
            pick(self.values),
            self.previous and pick(self.previous),
            self.computed_at[list(rows)],
            self.computed_before[list(rows)],
            (*self.signature[:-1], len(rows)),
        )

    @staticmethod
    def joined(parts: Sequence[CacheSlot], branch: ResidualBranch) -> CacheSlot:
        """The rows of several slots of one branch, one after another."""

        def cat(several: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(values, axis) for values, axis in zip(zip(*several, strict=True), axes, strict=True))

        axes = _row_axes(branch)
        with_previous = any(part.previous is not None for part in parts)
        return CacheSlot(
            cat([part.values for part in parts]),
            cat([part.previous or part.values for part in parts]) if with_previous else None,
            np.concatenate([part.computed_at for part in parts]),
            np.concatenate([part.computed_before for part in parts]),
            (*parts[0].signature[:-1], sum(part.signature[-1] for part in parts)),
        )

    @property
    def bytes(self) -> int:
        tensors = self.values + (self.previous or ())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _row_axes(branch: ResidualBranch) -> list[int]:
    return [output.batch_axis or 0 for output in branch.outputs]


@dataclass
class CacheState:
    """All slots of the rows of one call, as the next call that continues them finds them.

    Attributes:
        memory: what policies keep.
        timestep_before: the time input at the step before; None at the first.
    """

    slots: dict[int, CacheSlot] = field(default_factory=dict)
    memory: dict[str, object] = field(default_factory=dict)
    timestep_before: float | None = None

    def draft(self) -> CacheState:
        """A copy that a call may write to, so that one that fails leaves no trace."""
        return CacheState(dict(self.slots), dict(self.memory), self.timestep_before)

    def adopt(self, draft: CacheState) -> None:
        """Take over what a call that succeeded wrote."""
        self.slots, self.memory = draft.slots, draft.memory

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in self.slots.values())


Source = tuple[CacheState, int]
"""A row of an earlier call: where its caches are kept, and which row it is there."""


def gathered(sources: Sequence[Source | None], branches: Sequence[ResidualBranch]) -> CacheState:
    """The caches of rows that come from several calls, in a new order; rows without a source have nothing cached.

    A branch that takes one decision for all rows of a call keeps nothing: its rows cannot be taken apart.
    """
    result = CacheState()
    first = next((index for index, source in enumerate(sources) if source is not None), None)
    if first is None:
        return result
    for branch in branches:
        if not branch.row_separable:
            continue
        kept = _gathered_slot(sources, branch)
        if kept is not None:
            result.slots[branch.index] = kept
    return result


def _gathered_slot(sources: Sequence[Source | None], branch: ResidualBranch) -> CacheSlot | None:
    """The slot of one branch; rows that nothing is known of hold another's values, and are marked as never computed."""
    known = [_row_of(source, branch) for source in sources]
    stand_in = next((slot for slot in known if slot is not None), None)
    if stand_in is None:
        return None
    never = replace(stand_in, computed_at=np.array([NEVER]), computed_before=np.array([-1]))
    alike = [slot if slot is not None and slot.signature == stand_in.signature else never for slot in known]
    return CacheSlot.joined(alike, branch)


def _row_of(source: Source | None, branch: ResidualBranch) -> CacheSlot | None:
    if source is None:
        return None
    slot = source[0].slots.get(branch.index)
    if slot is None or slot.signature[0] != branch.name or source[1] >= slot.signature[-1]:
        return None
    return slot.of_rows([source[1]], branch)


NEVER = -(2**31)
"""``computed_at`` of a row that has nothing cached: it computes."""


def extrapolate(value: Tensor, previous: Tensor, factors: npt.NDArray[np.float64], batch_axis: int | None) -> Tensor:
    """``value + factor * (value - previous)``, one factor for each row; numbers that only count are repeated."""
    if (factors == factors[0]).all() or batch_axis is None:
        return moved(value, previous, float(factors[0]))
    if not (value.is_floating_point() or value.is_complex()):
        return value
    shape = [1] * value.dim()
    shape[batch_axis] = len(factors)
    factor = torch.from_numpy(factors).to(value.device, value.dtype).reshape(shape)
    return torch.lerp(value, previous, -factor)


def moved(value: Tensor, previous: Tensor, factor: float) -> Tensor:
    """``value + factor * (value - previous)``; numbers that only count are repeated."""
    if not factor or not (value.is_floating_point() or value.is_complex()):
        return value
    return torch.lerp(value, previous, -factor)


def usable(tensor: Tensor) -> Tensor:
    """A tensor that was cached under inference mode takes no part in autograd; outside that mode a copy does."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
