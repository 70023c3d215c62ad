"""Running a gated graph: caches, decisions, trajectories, and the account of what was saved."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.branch import ResidualBranch
from lazy_compile.config import LazyConfig
from lazy_compile.lazy_branch import LazyBranch
from lazy_compile.policy import GateQuery, Policy
from lazy_compile.row_matching import match_rows

if TYPE_CHECKING:
    from lazy_compile.step_invariants import StepInvariants

Rows = npt.NDArray[np.bool_]

_RECORDING = threading.Lock()
"""Threads that run one model share its statistics."""


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
        invariants: what need not be computed again, see :mod:`lazy_compile.step_invariants`.
    """

    slots: dict[int, CacheSlot] = field(default_factory=dict)
    memory: dict[str, object] = field(default_factory=dict)
    timestep_before: float | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    invariants: StepInvariants | None = None

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
        kept = 0 if self.invariants is None else self.invariants.bytes
        return kept + sum(slot.bytes for slot in self.slots.values())


@dataclass
class LazyStats:
    """What was saved since the last reset of the statistics.

    Attributes:
        reused: ``float64[steps, branches]``, rows that reused.
        evaluated: ``float64[steps, branches]``, rows that were asked.
        calls: how often the model ran.
        captures: how many graphs were captured.
    """

    branch_macs: npt.NDArray[np.float64]
    total_macs: int
    reused: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    evaluated: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    mixed: int = 0
    decided: int = 0
    calls: int = 0
    captures: int = 0

    @property
    def lazy_ratio(self) -> float:
        """Reused over all branch evaluations, rows counted singly."""
        return float(self._reused_share.mean())

    @property
    def compute_ratio(self) -> float:
        """MACs spent over the MACs of the dense model, always-on parts included."""
        return float(1.0 - (self._reused_share * self.branch_macs).sum() / self.total_macs)

    @property
    def _reused_share(self) -> npt.NDArray[np.float64]:
        width = len(self.branch_macs)
        asked = self.evaluated.reshape(-1, width).sum(axis=0)
        reused = self.reused.reshape(-1, width).sum(axis=0)
        share: npt.NDArray[np.float64] = np.divide(reused, asked, out=np.zeros(width), where=asked > 0)
        return share

    @property
    def reuse_table(self) -> npt.NDArray[np.float64]:
        """``float64[steps, branches]``: the share of rows that reused."""
        return np.divide(self.reused, self.evaluated, out=np.zeros_like(self.reused), where=self.evaluated > 0)

    @property
    def decisions_varying_between_samples(self) -> float:
        """Share of the decisions after the first step in which some rows of a batch computed and others reused."""
        return self.mixed / self.decided if self.decided else 0.0

    def record(self, step: int, branch: int, computes: Rows) -> None:
        with _RECORDING:
            self._record(step, branch, computes)

    def _record(self, step: int, branch: int, computes: Rows) -> None:
        if step >= len(self.reused):
            missing = ((0, step + 1 - len(self.reused)), (0, 0))
            width = len(self.branch_macs)
            self.reused = np.pad(self.reused.reshape(-1, width), missing)
            self.evaluated = np.pad(self.evaluated.reshape(-1, width), missing)
        computing = int(computes.sum())
        self.evaluated[step, branch] += len(computes)
        self.reused[step, branch] += len(computes) - computing
        if step > 0:
            self.decided += 1
            self.mixed += 0 < computing < len(computes)


@dataclass
class PolicyStep:
    """One call of the model under a policy; implements :class:`~lazy_compile.lazy_branch.LazyStep`.

    Attributes:
        planned: the branches that the policy was made for, by name, where the call may have others (it skips layers,
            say): one that the policy does not know computes. None if they are the call's own.
        leaders: for each branch the one that decides for it, see :func:`lazy_compile.grouping.leaders_of`; empty if
            each decides for itself.
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


def _signature(branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The number of rows comes last, and no size counts it before."""
    entries = []
    for position in branch.entry_positions:
        entry = inputs[position]
        axis = branch.row_axes[position] if branch.branch.row_separable else None
        shape = [size for index, size in enumerate(entry.shape) if index != axis]
        entries.append((*shape, entry.dtype, entry.device))
    return branch.branch.name, *entries, *(output.dtype for output in branch.branch.outputs), branch.rows(inputs)
