"""What branches produced at earlier steps, and the reuse arm that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.ir.branch import ResidualBranch

Values = tuple[Tensor, ...]
Steps = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]
Choose = Callable[[Values, Values], Values]


@dataclass(frozen=True)
class CacheSlot:
    """What one branch produced at earlier steps of some rows. Never written to: a step that computes makes another.

    Attributes:
        values: what it keeps of its latest computed outputs, see :meth:`~lazy_compile.ir.lazy_branch.LazyBranch.kept`.
        earlier: of those computed before, latest first, as many as the reuse arm needs and as there are.
        computed_at: ``int64[rows]``, the step at which each row was last computed.
        computed_before: ``int64[len(earlier), rows]``, the steps of ``earlier``; negative where there is none.
        signature: the branch, and the types of its entries and outputs: only a call that agrees may reuse it.
    """

    values: Values
    earlier: tuple[Values, ...]
    computed_at: Steps
    computed_before: Steps
    signature: tuple[Any, ...]

    @classmethod
    def first(cls, values: Values, now: Steps, signature: tuple[Any, ...] = ()) -> CacheSlot:
        """That of a branch which never computed before."""
        return cls(values, (), now, np.zeros((0, len(now)), dtype=np.int64), signature)

    def renewed(self, values: Values, now: Steps, order: int, computes: Rows, choose: Choose | None) -> CacheSlot:
        """The slot behind a step at which some rows computed.

        Args:
            values: the latest of all rows, computed now or before.
            now: ``int64[rows]``, the step of each row.
            order: how many earlier values are kept.
            computes: ``bool[rows]``, which rows computed.
            choose: takes the rows that computed from the first, the others from the second; None if all computed.
        """
        times = [self.computed_at, *self.computed_before][:order]
        earlier = [self.values, *self.earlier][:order]
        if choose is not None:
            for place, newer in enumerate(list(earlier)):
                there = place < len(self.earlier)
                earlier[place] = choose(newer, self.earlier[place] if there else newer)
                times[place] = np.where(computes, times[place], self.computed_before[place] if there else NEVER)
        before = np.stack(times) if times else np.zeros((0, len(now)), dtype=np.int64)
        return CacheSlot(values, tuple(earlier), np.where(computes, now, self.computed_at), before, self.signature)

    def extrapolated(self, steps: Steps, slopes: Floats, branch: ResidualBranch) -> Values:
        """What a branch keeps that is reused: along the polynomial through its values, as far as ``slopes[rows]``."""
        if not self.earlier:
            return tuple(usable(value) for value in self.values)
        weights = slopes * lagrange_weights(steps, self.computed_at, self.computed_before)
        return tuple(
            extrapolate(usable(value), [usable(each) for each in earlier], weights, output.batch_axis)
            for value, output, *earlier in zip(self.values, branch.outputs, *self.earlier, strict=True)
        )

    def of_rows(self, rows: Sequence[int], branch: ResidualBranch) -> CacheSlot:
        """What it holds for some rows, in their order."""
        index = torch.tensor(rows, device=self.values[0].device)
        axes = _row_axes(branch)

        def pick(values: Values) -> Values:
            return tuple(value.index_select(axis, index) for value, axis in zip(values, axes, strict=True))

        return CacheSlot(
            pick(self.values),
            tuple(map(pick, self.earlier)),
            self.computed_at[list(rows)],
            self.computed_before[:, list(rows)],
            (*self.signature[:-1], len(rows)),
        )

    @staticmethod
    def joined(parts: Sequence[CacheSlot], branch: ResidualBranch) -> CacheSlot:
        """The rows of several slots of one branch, one after another."""

        def cat(several: Sequence[Values]) -> Values:
            return tuple(torch.cat(values, axis) for values, axis in zip(zip(*several, strict=True), axes, strict=True))

        axes, most = _row_axes(branch), max(len(part.earlier) for part in parts)
        parts = [part._padded(most) for part in parts]
        return CacheSlot(
            cat([part.values for part in parts]),
            tuple(cat([part.earlier[place] for part in parts]) for place in range(most)),
            np.concatenate([part.computed_at for part in parts]),
            np.concatenate([part.computed_before for part in parts], axis=1),
            (*parts[0].signature[:-1], sum(part.signature[-1] for part in parts)),
        )

    def _padded(self, count: int) -> CacheSlot:
        """The same with ``count`` earlier values: those that there are not are marked as never computed."""
        missing = count - len(self.earlier)
        never = np.full((missing, len(self.computed_at)), NEVER)
        before = np.concatenate([self.computed_before, never])
        return replace(self, earlier=self.earlier + (self.values,) * missing, computed_before=before)

    @property
    def bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size() for values in (self.values, *self.earlier) for tensor in values
        )


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
    never = replace(
        stand_in, computed_at=np.array([NEVER]), computed_before=np.full_like(stand_in.computed_before, NEVER)
    )
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


def lagrange_weights(steps: Steps, computed_at: Steps, computed_before: Steps) -> Floats:
    """``float64[n, rows]``: how much of each earlier value, less the last one, follows the polynomial through all.

    A row that has fewer earlier values follows the polynomial through those that it has.
    """
    places = np.concatenate([computed_at[None], computed_before]).astype(np.float64)
    result = np.zeros(computed_before.shape)
    for degree in range(1, len(places)):
        known = computed_before[degree - 1] >= 0
        for place in range(1, degree + 1):
            others = np.delete(places[: degree + 1], place, axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.prod((steps - others) / (places[place] - others), axis=0)
            result[place - 1] = np.where(known, weight, result[place - 1])
    return result


def extrapolate(value: Tensor, earlier: Sequence[Tensor], weights: Floats, batch_axis: int | None) -> Tensor:
    """``value + weight * (earlier - value) + ...``, ``weights[n, rows]``; numbers that only count are repeated."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    result = value
    for before, weight in zip(earlier, weights, strict=True):
        if not weight.any():
            continue
        if (weight == weight[0]).all() or batch_axis is None:
            factor: float | Tensor = float(weight[0])
        else:
            shape = [1] * value.dim()
            shape[batch_axis] = len(weight)
            factor = torch.from_numpy(weight).to(value.device, value.dtype).reshape(shape)
        result = torch.lerp(value, before, factor) if result is value else result + factor * (before - value)
    return result


def usable(tensor: Tensor) -> Tensor:
    """A tensor that was cached under inference mode takes no part in autograd; outside that mode a copy does."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
