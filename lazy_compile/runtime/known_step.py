"""One call of a lazy model whose decisions are known when it begins: nothing is asked at a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.config import LazyConfig
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import Policy, spread
from lazy_compile.runtime.cache import NEVER, CacheSlot, CacheState, moved, usable
from lazy_compile.runtime.model_call import RowGroup
from lazy_compile.runtime.stats import LazyStats

Signatures = Mapping[int, tuple[Any, ...]]
"""For each branch what a slot must agree with, see :class:`~lazy_compile.runtime.cache.CacheSlot`."""


@dataclass(eq=False)
class KnownStep:
    """A call in which all rows do alike; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`.

    It does what :class:`~lazy_compile.runtime.policy_step.PolicyStep` does, bit for bit.

    Attributes:
        state: written to; a draft of what must outlive a failure.
        step: which call of its trajectory this is.
        factors: for each branch None if it computes, else how far it follows its line, in distances between the last
            two computed steps.
        linear: whether the outputs computed before are kept.
    """

    state: CacheState
    step: int
    factors: Sequence[float | None]
    signatures: Signatures
    linear: bool
    _now: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._slots = self.state.slots
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index = branch.index
        factor = self.factors[index]
        if factor is None:
            outputs = branch.compute(inputs)
            self.keep(index, outputs)
            return outputs
        return self.reuse(index, factor)

    def keep(self, index: int, outputs: Sequence[Tensor]) -> None:
        """Cache what a branch has computed."""
        signature = self.signatures[index]
        slot = self._slots.get(index) if self.linear else None
        if slot is not None and slot.signature != signature:
            slot = None
        values = tuple([output.detach() if output.requires_grad else output for output in outputs])
        now = self._rows(signature[-1], self.step)
        if slot is None:
            self._slots[index] = CacheSlot(values, None, now, self._rows(signature[-1], -1), signature)
        else:
            self._slots[index] = CacheSlot(values, slot.values, now, slot.computed_at, signature)

    def reuse(self, index: int, factor: float) -> tuple[Tensor, ...]:
        slot = self._slots[index]
        values, previous = slot.values, slot.previous
        if not self._inference:
            values = tuple(map(usable, values))
            previous = previous and tuple(map(usable, previous))
        if previous is None or not factor:
            return values
        return tuple([moved(value, before, factor) for value, before in zip(values, previous, strict=True)])

    def record(self, stats: LazyStats) -> None:
        """Count this call, once it has succeeded."""
        rows = np.array([self.signatures[index][-1] for index in range(len(self.factors))], dtype=np.float64)
        stats.record_step(self.step, np.array([factor is None for factor in self.factors]), rows)

    def _rows(self, rows: int, value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """One number for each row; slots share them, as nobody writes to them."""
        key = rows if value >= 0 else -rows
        if key not in self._now:
            self._now[key] = np.full(rows, value, dtype=np.int64)
        return self._now[key]


def known_step(
    policy: Policy,
    config: LazyConfig,
    state: CacheState,
    groups: Sequence[RowGroup],
    columns: Sequence[int | None],
    leaders: Sequence[int],
    signatures: Signatures | None,
) -> KnownStep | None:
    """What a call does, if that is known before it begins and is the same for all of its rows; else None.

    Args:
        columns: for each branch its index among those that the policy was made for; None if it is none of them.
        leaders: for each branch the one that decides for it.
        signatures: of the branches, from an earlier call of these sizes; None if there was none.
    """
    if signatures is None or len(groups) != 1 or not _decides_before_step(policy):
        return None
    (group,) = groups
    decided = spread(policy.decided(group.step, group.timestep, group.before, state.memory), len(columns))
    slopes = policy.slopes(group.step, group.timestep, group.before)
    warm, limit = group.step < config.warmup_steps, config.max_reuse_age
    times: dict[tuple[int, int], tuple[int, int] | None] = {}
    factors: list[float | None] = []
    for index, column in enumerate(columns):
        slot, leader = state.slots.get(index), leaders[index]
        if leader > index:
            return None
        factor: float | None = None
        computes = column is None or slot is None or slot.signature != signatures[index]
        if not computes and slot is not None and column is not None:
            key = (id(slot.computed_at), id(slot.computed_before))
            if key not in times:
                times[key] = _uniform(slot)
            found = times[key]
            if found is None:
                return None
            at, before = found
            if leader != index:
                computes = factors[leader] is None
            else:
                answer = decided[column]
                if answer is None:
                    return None
                computes = warm or answer or (limit is not None and group.step - at > limit)
            if not computes and at != NEVER:
                lead = columns[leader]
                slope = 1.0 if slopes is None or lead is None else slopes[lead]
                factor = 0.0 if before < 0 else slope * (group.step - at) / (at - before)
        factors.append(factor)
    return KnownStep(state, group.step, factors, signatures, config.reuse == "linear")


def _decides_before_step(policy: Policy) -> bool:
    """Whether the rule is one that is not asked at a branch."""
    kind = type(policy)
    return policy.known_before_step and kind.should_compute is Policy.should_compute and kind.observe is Policy.observe


def _uniform(slot: CacheSlot) -> tuple[int, int] | None:
    """When all rows were computed last, and before that; None if they differ."""
    at, before = slot.computed_at, slot.computed_before
    if (at == at[0]).all() and (before == before[0]).all() and at[0] > before[0]:
        return int(at[0]), int(before[0])
    return None


def columns_of(branches: Sequence[ResidualBranch], planned: Mapping[str, ResidualBranch] | None) -> list[int | None]:
    """For each branch its index among those that a policy was made for, see :class:`PolicyStep`."""
    if planned is None:
        return list(range(len(branches)))
    found = [planned.get(branch.name) for branch in branches]
    return [
        other.index if other is not None and other.kind == branch.kind else None
        for branch, other in zip(branches, found, strict=True)
    ]
