"""Running a gated graph: caches, decisions, trajectories, and the account of what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.config import LazyConfig
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import GateQuery, Policy
from lazy_compile.runtime.cache import CacheSlot, CacheState, _usable, extrapolate
from lazy_compile.runtime.stats import LazyStats, Rows

if TYPE_CHECKING:
    pass


@dataclass
class PolicyStep:
    """One call of the model under a policy; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`.

    Attributes:
        planned: the branches that the policy was made for, by name, where the call may have others (it skips layers,
            say): one that the policy does not know computes. None if they are the call's own.
        leaders: for each branch the one that decides for it, see :func:`lazy_compile.policies.gate_layout.leaders_of`;
            empty if each decides for itself.
    """

    policy: Policy
    config: LazyConfig
    state: CacheState
    stats: LazyStats
    step: int
    timestep: float
    planned: Mapping[str, ResidualBranch] | None = None
    leaders: tuple[int, ...] = ()
    _decided: dict[int, Rows] = field(default_factory=dict, init=False)
    _slopes: dict[int, float] = field(default_factory=dict, init=False)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index = branch.branch.index
        signature = _signature(branch, inputs)
        slot = self.state.slots.get(index)
        if slot is not None and slot.signature != signature:
            slot = None
        computes = self._decide(branch, inputs, slot)
        self.stats.record(self.step, index, computes)
        if slot is None or computes.all():
            outputs = branch.compute(inputs)
            self.state.slots[index] = self._computed(slot, outputs, len(computes), signature)
            return outputs
        reused = self._reuse(branch, slot)
        if not computes.any():
            return reused
        rows = torch.from_numpy(np.flatnonzero(computes)).to(reused[0].device)
        fresh = branch.compute_rows(inputs, rows)
        axes = [output.batch_axis or 0 for output in branch.branch.outputs]
        self._computed_rows(slot, fresh, rows, computes, axes)
        return tuple(
            old.index_copy(axis, rows, new.to(old.dtype)) for old, new, axis in zip(reused, fresh, axes, strict=True)
        )

    def _decide(self, branch: LazyBranch, inputs: Sequence[Any], slot: CacheSlot | None) -> Rows:
        rows = branch.rows(inputs)
        index, planned = branch.branch.index, self._planned(branch.branch)
        leader = self.leaders[index] if self.leaders else index
        if slot is None or planned is None or self.step < self.config.warmup_steps:
            if leader == index and planned is not None:
                self.policy.observe(self._query(planned, branch, inputs))
            computes = np.ones(rows, dtype=bool)
        elif leader == index:
            computes = self._ask(self._query(planned, branch, inputs), rows)
            if self.config.max_reuse_age is not None:
                computes = computes | (self.step - slot.computed_at > self.config.max_reuse_age)
        else:
            decided = self._decided[leader]
            computes = decided if len(decided) == rows else np.full(rows, decided.any())
        self._decided[index] = computes
        self._slopes[index] = self._slope(planned) if leader == index else self._slopes[leader]
        return computes

    def _slope(self, planned: ResidualBranch | None) -> float:
        slopes = self._slopes_of_policy
        return 1.0 if slopes is None or planned is None else slopes[planned.index]

    @cached_property
    def _slopes_of_policy(self) -> Sequence[float] | None:
        return self.policy.slopes(self.step, self.timestep, self.state.timestep_before)

    def _query(self, planned: ResidualBranch, branch: LazyBranch, inputs: Sequence[Any]) -> GateQuery:
        before, memory = self.state.timestep_before, self.state.memory
        return GateQuery(planned, branch.entries(inputs), self.step, self.timestep, before, memory)

    def _ask(self, query: GateQuery, rows: int) -> Rows:
        answer = self.policy.should_compute(query)
        if not isinstance(answer, Tensor):
            return np.full(rows, answer)
        computes = answer.detach().cpu().numpy().astype(bool)
        if not query.branch.row_separable or self.config.batch_rule != "per_sample":
            return np.full(rows, self._joint_decision(computes))
        return computes

    def _planned(self, branch: ResidualBranch) -> ResidualBranch | None:
        if self.planned is None:
            return branch
        found = self.planned.get(branch.name)
        if found is None or (found.kind, found.gate_features) != (branch.kind, branch.gate_features):
            return None
        return found

    def _joint_decision(self, computes: Rows) -> bool:
        if self.config.batch_rule == "any_reuse":
            return bool(computes.all())
        if self.config.batch_rule == "majority":
            return bool(computes.mean() >= 0.5)
        return bool(computes.any())

    def _computed(
        self, slot: CacheSlot | None, outputs: tuple[Tensor, ...], rows: int, signature: tuple[Any, ...]
    ) -> CacheSlot:
        values = tuple(output.detach() for output in outputs)
        now = np.full(rows, self.step, dtype=np.int64)
        if slot is None or self.config.reuse == "last":
            return CacheSlot(values, None, now, np.full(rows, -1, dtype=np.int64), signature)
        return CacheSlot(values, slot.values, now, slot.computed_at, signature)

    def _computed_rows(
        self, slot: CacheSlot, fresh: tuple[Tensor, ...], rows: Tensor, computes: Rows, axes: Sequence[int]
    ) -> None:
        def replace(old: tuple[Tensor, ...], new: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(
                _usable(a).index_copy(axis, rows, b.detach().to(a.dtype))
                for a, b, axis in zip(old, new, axes, strict=True)
            )

        if self.config.reuse == "linear":
            kept = [value.index_select(axis, rows) for value, axis in zip(slot.values, axes, strict=True)]
            slot.previous = replace(slot.previous or slot.values, kept)
            slot.computed_before = np.where(computes, slot.computed_at, slot.computed_before)
        slot.values = replace(slot.values, fresh)
        slot.computed_at = np.where(computes, self.step, slot.computed_at)

    def _reuse(self, branch: LazyBranch, slot: CacheSlot) -> tuple[Tensor, ...]:
        if slot.previous is None:
            return tuple(_usable(value) for value in slot.values)
        distance = np.where(slot.computed_before < 0, np.inf, slot.computed_at - slot.computed_before)
        factors = self._slopes[branch.branch.index] * (self.step - slot.computed_at) / distance
        return tuple(
            extrapolate(_usable(value), _usable(previous), factors, output.batch_axis)
            for value, previous, output in zip(slot.values, slot.previous, branch.branch.outputs, strict=True)
        )


def _signature(branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The number of rows comes last, and no size counts it before."""
    entries = []
    for position in branch.entry_positions:
        entry = inputs[position]
        axis = branch.row_axes[position] if branch.branch.row_separable else None
        shape = [size for index, size in enumerate(entry.shape) if index != axis]
        entries.append((*shape, entry.dtype, entry.device))
    return branch.branch.name, *entries, *(output.dtype for output in branch.branch.outputs), branch.rows(inputs)
