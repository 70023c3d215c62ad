"""One call of a lazy model under a policy: who computes, who reuses, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.config import LazyConfig
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import GateQuery, Policy
from lazy_compile.processes import averaged
from lazy_compile.runtime.cache import NEVER, CacheSlot, CacheState, reused_behind, usable
from lazy_compile.runtime.cache_format import CacheFormat
from lazy_compile.runtime.model_call import RowGroup
from lazy_compile.runtime.signatures import Signature, signature_of
from lazy_compile.runtime.stats import LazyStats, Rows

Steps = npt.NDArray[np.int64]
Slopes = npt.NDArray[np.float64]


@dataclass
class PolicyStep:
    """One call of the model under a policy; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`.

    Attributes:
        state: written to; a :meth:`~lazy_compile.runtime.cache.CacheState.draft` of what must outlive a failure.
        groups: where the rows of the call stand in their trajectories.
        planned: the branches that the policy was made for, by name, where the call may have others (it skips layers,
            say): one that the policy does not know computes. None if they are the call's own.
        leaders: for each branch the one that decides for it, see :func:`lazy_compile.policies.gate_layout.leaders_of`;
            empty if each decides for itself.
        collective_groups: of processes that hold the tokens of this call together, and decide as one.
        decisions: ``(step, branch, bool[rows])`` of all branches so far.
        without_room: branches that are not cached, since ``config.max_cache_bytes`` are taken.
        signatures: of the branches so far, see :class:`~lazy_compile.runtime.cache.CacheSlot`.
    """

    policy: Policy
    config: LazyConfig
    state: CacheState
    groups: Sequence[RowGroup]
    planned: Mapping[str, ResidualBranch] | None = None
    leaders: tuple[int, ...] = ()
    collective_groups: tuple[str, ...] = ()
    decisions: list[tuple[int, int, Rows]] = field(default_factory=list, init=False)
    without_room: list[str] = field(default_factory=list, init=False)
    signatures: dict[int, Signature] = field(default_factory=dict, init=False)
    _decided: dict[int, Rows] = field(default_factory=dict, init=False)
    _slopes: dict[int, Slopes] = field(default_factory=dict, init=False)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index = branch.branch.index
        signature = self.signatures[index] = signature_of(branch, inputs)
        slot = self.state.slots.get(index)
        if slot is not None and slot.signature != signature:
            slot = None
        computes = self._decide(branch, inputs, slot)
        self._note(index, computes)
        if slot is None or computes.all():
            outputs = branch.compute(inputs)
            if self._keeps(branch.branch):
                kept = branch.kept(inputs, outputs)
                self._store(branch.branch, self._computed(slot, branch.branch, kept, len(computes), signature))
            else:
                self.state.slots.pop(index, None)
            return outputs
        reused = branch.restored(inputs, self._reuse(branch, slot, inputs))
        if not computes.any():
            if not self._keeps(branch.branch):
                del self.state.slots[index]
            return reused
        rows = torch.from_numpy(np.flatnonzero(computes)).to(reused[0].device)
        picked = branch.picked(inputs, rows)
        fresh = branch.compute(picked)
        self._store(branch.branch, self._computed_rows(slot, branch.branch, branch.kept(picked, fresh), rows, computes))
        axes = [output.batch_axis or 0 for output in branch.branch.outputs]
        return tuple(
            old.index_copy(axis, rows, new.to(old.dtype)) for old, new, axis in zip(reused, fresh, axes, strict=True)
        )

    def record(self, stats: LazyStats) -> None:
        """Count this call, once it has succeeded."""
        stats.record_call(self.decisions)

    def _note(self, index: int, computes: Rows) -> None:
        if len(computes) == 1:  # one for all rows, wherever they stand
            self.decisions.append((self.groups[0].step, index, computes))
            return
        for group in self.groups:
            self.decisions.append((group.step, index, computes if group.rows is None else computes[list(group.rows)]))

    def _decide(self, branch: LazyBranch, inputs: Sequence[Any], slot: CacheSlot | None) -> Rows:
        rows = branch.rows(inputs)
        index, planned = branch.branch.index, self._planned(branch.branch)
        leader = self.leaders[index] if self.leaders else index
        if leader == index:
            computes = self._decide_alone(branch, planned, inputs, slot, rows)
        else:
            decided = self._decided[leader]
            computes = decided if len(decided) == rows else np.full(rows, decided.any())
            if slot is None or planned is None:
                computes = np.ones(rows, dtype=bool)
        if slot is not None:
            computes = computes | (slot.computed_at == NEVER)
            if not branch.branch.row_separable or self.config.batch_rule != "per_sample":
                computes = np.full(rows, computes.any() if (slot.computed_at == NEVER).any() else computes[0])
        self._decided[index] = computes
        self._slopes[index] = self._slopes_at(planned, rows) if leader == index else self._slopes[leader]
        return computes

    def _decide_alone(
        self,
        branch: LazyBranch,
        planned: ResidualBranch | None,
        inputs: Sequence[Any],
        slot: CacheSlot | None,
        rows: int,
    ) -> Rows:
        """What a branch that leads does, group by group of rows."""
        computes = np.ones(rows, dtype=bool)
        if planned is None:
            return computes
        entries = branch.entries(inputs)
        together = rows == 1 and len(self.groups) > 1  # one decision for rows at several steps: any that computes
        for group in self.groups:
            query = GateQuery(
                planned, entries, group.step, group.timestep, group.before, self.state.memory, self._average
            )
            if slot is None or group.step < self.config.warmup_steps:
                self.policy.observe(query)
                if together:
                    return np.ones(rows, dtype=bool)
                continue
            answer = self._ask(query, rows)
            if self.config.max_reuse_age is not None:
                answer = answer | (group.step - slot.computed_at > self.config.max_reuse_age)
            if together:
                if answer.any():
                    return np.ones(rows, dtype=bool)
                computes[:] = False
            elif group.rows is None or rows == 1:
                computes = answer
            else:
                computes[list(group.rows)] = answer[list(group.rows)]
        if len(self.groups) > 1 and self.config.batch_rule != "per_sample":
            computes = np.full(rows, self._joint_decision(computes))
        return computes

    def _ask(self, query: GateQuery, rows: int) -> Rows:
        answer = self.policy.should_compute(query)
        if self.collective_groups and not self.policy.known_before_step and not self.policy.reads_gates:
            wanted = torch.as_tensor(answer, device=query.entries[0].device)
            answer = self._average(wanted.float()) > 0  # if one process computes, all do: they wait for each other
            answer = answer.expand(rows)
        if not isinstance(answer, Tensor):
            return np.full(rows, answer)
        computes = answer.detach().cpu().numpy().astype(bool)
        if not query.branch.row_separable or self.config.batch_rule != "per_sample":
            return np.full(rows, self._joint_decision(computes))
        return computes

    def _average(self, tensor: Tensor) -> Tensor:
        return averaged(tensor, self.collective_groups)

    def _joint_decision(self, computes: Rows) -> bool:
        if self.config.batch_rule == "any_reuse":
            return bool(computes.all())
        if self.config.batch_rule == "majority":
            return bool(computes.mean() >= 0.5)
        return bool(computes.any())

    def _planned(self, branch: ResidualBranch) -> ResidualBranch | None:
        """The branch as the policy knows it. One that reads no entries does not mind how wide they are."""
        if self.planned is None:
            return branch
        found = self.planned.get(branch.name)
        if found is None or found.kind != branch.kind:
            return None
        if not self.policy.known_before_step and found.gate_features != branch.gate_features:
            return None
        return found

    def _slopes_at(self, planned: ResidualBranch | None, rows: int) -> Slopes:
        result = np.ones(rows)
        if planned is None:
            return result
        for group, slopes in zip(self.groups, self._slopes_of_policy, strict=True):
            if slopes is None:
                continue
            if group.rows is None or rows == 1:
                result[:] = slopes[planned.index]
            else:
                result[list(group.rows)] = slopes[planned.index]
        return result

    @cached_property
    def _slopes_of_policy(self) -> list[Sequence[float] | None]:
        return [self.policy.slopes(group.step, group.timestep, group.before) for group in self.groups]

    def _steps(self, rows: int) -> Steps:
        """``int64[rows]``: the step of each row."""
        if self.groups[0].rows is None or rows == 1:
            return np.full(rows, self.groups[0].step, dtype=np.int64)
        steps = np.zeros(rows, dtype=np.int64)
        for group in self.groups:
            steps[list(group.rows or ())] = group.step
        return steps

    def _keeps(self, branch: ResidualBranch) -> bool:
        """Whether the policy may ever reuse a branch after this step, as far as its steps are known."""
        planned, behind = self._planned(branch), self._reused_behind
        if planned is None or behind is None:
            return planned is not None
        alone = not self.leaders or self.leaders[branch.index] == branch.index == planned.index
        return bool(behind[planned.index] if alone and planned.index < len(behind) else behind.any())

    @cached_property
    def _reused_behind(self) -> Rows | None:
        branches = 1 if self.planned is None else len(self.planned)
        return reused_behind(self.policy, branches, [group.step for group in self.groups])

    def _store(self, branch: ResidualBranch, slot: CacheSlot) -> None:
        """Keep a slot, if there is room for it."""
        most, slots = self.config.max_cache_bytes, self.state.slots
        slots.pop(branch.index, None)
        if most is None or slot.bytes + self.state.bytes <= most:
            slots[branch.index] = slot
        else:
            self.without_room.append(branch.name)

    def _computed(
        self,
        slot: CacheSlot | None,
        branch: ResidualBranch,
        kept: tuple[Tensor, ...],
        rows: int,
        signature: Signature,
    ) -> CacheSlot:
        values, now = self._format.store([value.detach() for value in kept], branch), self._steps(rows)
        if slot is None:
            return CacheSlot.first(values, now, signature, self._format)
        return slot.renewed(values, now, self.config.values_kept - 1, np.ones(rows, dtype=bool), None)

    def _computed_rows(
        self, slot: CacheSlot, branch: ResidualBranch, kept: tuple[Tensor, ...], rows: Tensor, computes: Rows
    ) -> CacheSlot:
        axes = slot.format.row_axes(branch)
        rows = rows.to(slot.values[0].device)

        def choose(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return replaced(old, [value.index_select(axis, rows) for value, axis in zip(new, axes, strict=True)])

        def replaced(old: tuple[Tensor, ...], new: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(
                usable(a).index_copy(axis, rows, b.detach().to(a.dtype))
                for a, b, axis in zip(old, new, axes, strict=True)
            )

        now, order = self._steps(len(computes)), self.config.values_kept - 1
        return slot.renewed(replaced(slot.values, slot.format.store(kept, branch)), now, order, computes, choose)

    def _reuse(self, branch: LazyBranch, slot: CacheSlot, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        steps, device = self._steps(len(slot.computed_at)), branch.entries(inputs)[0].device
        return slot.extrapolated(steps, self._slopes[branch.branch.index], branch.branch, device)

    @cached_property
    def _format(self) -> CacheFormat:
        return CacheFormat.of(self.config)
