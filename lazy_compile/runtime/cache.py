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
from lazy_compile.ir.extrapolation import DAMPING
from lazy_compile.policies.policy import Policy
from lazy_compile.runtime.cache_format import AS_THEY_ARE, CacheFormat, Values

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
        format: how values are held.
    """

    values: Values
    earlier: tuple[Values, ...]
    computed_at: Steps
    computed_before: Steps
    signature: tuple[Any, ...]
    format: CacheFormat = AS_THEY_ARE

    @classmethod
    def first(
        cls, values: Values, now: Steps, signature: tuple[Any, ...] = (), form: CacheFormat = AS_THEY_ARE
    ) -> CacheSlot:
        """That of a branch which never computed before."""
        return cls(values, (), now, np.zeros((0, len(now)), dtype=np.int64), signature, form)

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
        at = np.where(computes, now, self.computed_at)
        return replace(self, values=values, earlier=tuple(earlier), computed_at=at, computed_before=before)

    def extrapolated(
        self, steps: Steps, slopes: Floats, branch: ResidualBranch, device: torch.device | None = None
    ) -> Values:
        """What a branch keeps that is reused: extrapolated from its values, as far as ``slopes[rows]``."""
        values, *others = (
            self.format.load(tuple(map(usable, each)), branch, device or each[0].device)
            for each in (self.values, *self.earlier)
        )
        if not others:
            return values
        weights = slopes * extrapolation_weights(steps, self.computed_at, self.computed_before)
        return tuple(
            extrapolate(value, earlier, weights, output.batch_axis)
            for value, output, *earlier in zip(values, branch.outputs, *others, strict=True)
        )

    def of_rows(self, rows: Sequence[int], branch: ResidualBranch) -> CacheSlot:
        """What it holds for some rows, in their order."""
        index = torch.tensor(rows, device=self.values[0].device)
        axes = self.format.row_axes(branch)

        def pick(values: Values) -> Values:
            return tuple(value.index_select(axis, index) for value, axis in zip(values, axes, strict=True))

        return CacheSlot(
            pick(self.values),
            tuple(map(pick, self.earlier)),
            self.computed_at[list(rows)],
            self.computed_before[:, list(rows)],
            (*self.signature[:-1], len(rows)),
            self.format,
        )

    @staticmethod
    def joined(parts: Sequence[CacheSlot], branch: ResidualBranch) -> CacheSlot:
        """The rows of several slots of one branch, one after another."""

        def cat(several: Sequence[Values]) -> Values:
            return tuple(torch.cat(values, axis) for values, axis in zip(zip(*several, strict=True), axes, strict=True))

        axes, most = parts[0].format.row_axes(branch), max(len(part.earlier) for part in parts)
        parts = [part._padded(most) for part in parts]
        return CacheSlot(
            cat([part.values for part in parts]),
            tuple(cat([part.earlier[place] for part in parts]) for place in range(most)),
            np.concatenate([part.computed_at for part in parts]),
            np.concatenate([part.computed_before for part in parts], axis=1),
            (*parts[0].signature[:-1], sum(part.signature[-1] for part in parts)),
            parts[0].format,
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


def reused_behind(policy: Policy, branches: int, steps: Sequence[int]) -> Rows | None:
    """``bool[branches]``: what a policy reuses at any step behind one of these; None if it is not known before."""
    table = policy.step_table(branches)
    if table is None:
        return None
    found: Rows = np.any([~table.behind(step).all(axis=0) for step in steps], axis=0)
    return found


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


def extrapolation_weights(steps: Steps, computed_at: Steps, computed_before: Steps) -> Floats:
    """``float64[n, rows]``: how much of each earlier value, less the last one, extrapolation takes.

    Newton's form of the polynomial through all values, whose terms count :data:`DAMPING` times less from each order to
    the next, since higher orders amplify what is no polynomial. TaylorSeer (arXiv 2503.06923) weakens them too: by 1/3
    one step after computations that were two apart, by 1/4 where they were three apart. A row that has fewer earlier
    values has fewer terms.
    """
    places = np.concatenate([computed_at[None], computed_before]).astype(np.float64)
    differences = np.broadcast_to(np.eye(len(places))[..., None], (len(places), *places.shape))  # [from, value, row]
    power, result = np.ones(places.shape[1]), np.zeros(places.shape)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for order in range(1, len(places)):
            spans = (places[:-order] - places[order:])[:, None]
            differences = (differences[:-1] - differences[1:]) / spans
            power = power * (steps - places[order - 1]) * (DAMPING if order > 1 else 1.0)
            result += np.where(computed_before[order - 1] >= 0, power * differences[0], 0.0)
    return result[1:]


def extrapolate(value: Tensor, earlier: Sequence[Tensor], weights: Floats, batch_axis: int | None) -> Tensor:
    """``value + weight * (earlier - value) + ...``, ``weights[n, rows]``; numbers that only count are repeated."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    factors: list[float | Tensor] = []
    for weight in weights:
        if (weight == weight[0]).all() or batch_axis is None:
            factors.append(float(weight[0]))
        else:
            shape = [1] * value.dim()
            shape[batch_axis] = len(weight)
            factors.append(torch.from_numpy(weight).to(value.device, value.dtype).reshape(shape))
    return along(value, earlier, factors)


def along(value: Tensor, earlier: Sequence[Tensor], factors: Sequence[float | Tensor]) -> Tensor:
    """The same with one factor for all rows, or one that broadcasts."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    result = value
    for before, factor in zip(earlier, factors, strict=True):
        if isinstance(factor, Tensor) or factor:
            result = torch.lerp(value, before, factor) if result is value else result + factor * (before - value)
    return result


def usable(tensor: Tensor) -> Tensor:
    """A tensor that was cached under inference mode takes no part in autograd; outside that mode a copy does."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
