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
from lazy_compile.runtime.cache import (
    NEVER,
    CacheSlot,
    CacheState,
    Steps,
    along,
    extrapolation_weights,
    reused_behind,
    usable,
)
from lazy_compile.runtime.cache_format import Values
from lazy_compile.runtime.model_call import RowGroup
from lazy_compile.runtime.signatures import Signature
from lazy_compile.runtime.stats import LazyStats

Signatures = Mapping[int, Signature]
"""For each branch what a slot must agree with, see :class:`~lazy_compile.runtime.cache.CacheSlot`."""


Weights = tuple[float, ...]
"""How much of each earlier value, less the last one, a branch that is reused follows; empty if it repeats the last."""


@dataclass(eq=False)
class KnownStep:
    """A call in which all rows do alike; implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`.

    It does what :class:`~lazy_compile.runtime.policy_step.PolicyStep` does, bit for bit.

    Attributes:
        state: written to; a draft of what must outlive a failure.
        step: which call of its trajectory this is.
        weights: for each branch; None if it computes.
        order: how many earlier values are kept.
        keeps: for each branch whether it may be reused at a later step; if not, nothing is kept of it.
    """

    state: CacheState
    step: int
    weights: Sequence[Weights | None]
    signatures: Signatures
    order: int
    keeps: Sequence[bool]
    _times: dict[tuple[int, ...], Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._slots = self.state.slots
        self._inference = torch.is_inference_mode_enabled()

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index = branch.index
        weights = self.weights[index]
        if weights is not None:
            outputs = branch.restored(inputs, self._extrapolated(index, weights))
        else:
            outputs = branch.compute(inputs)
            if self.keeps[index]:
                self.keep(index, branch.kept(inputs, outputs))
        if not self.keeps[index]:
            self.drop(index)
        return outputs

    def keep(self, index: int, kept: tuple[Tensor, ...]) -> None:
        """Store what a branch computed."""
        signature, slot = self.signatures[index], self._slots.get(index)
        if slot is not None and slot.signature != signature:
            slot = None
        values = tuple([value.detach() if value.requires_grad else value for value in kept])
        earlier = (slot.values, *slot.earlier)[: self.order] if slot is not None else ()
        now, before = self._behind(signature[-1], slot)
        self._slots[index] = CacheSlot(values, earlier, now, before, signature)

    def drop(self, index: int) -> None:
        """Forget what a branch stored."""
        self._slots.pop(index, None)

    def stored(self, index: int) -> tuple[Values, Sequence[Values]]:
        """What the slot of a branch holds: the last values, and those before them."""
        slot = self._slots[index]
        if self._inference:
            return slot.values, slot.earlier
        return tuple(map(usable, slot.values)), [tuple(map(usable, each)) for each in slot.earlier]

    def _behind(self, rows: int, slot: CacheSlot | None) -> tuple[Steps, Steps]:
        """The times of a slot behind this step; slots share them, as nobody writes to them."""
        key = (rows,) if slot is None else (rows, id(slot.computed_at), id(slot.computed_before))
        if key not in self._times:
            times = [slot.computed_at, *slot.computed_before][: self.order] if slot is not None else []
            before = np.stack(times) if times else np.zeros((0, rows), dtype=np.int64)
            self._times[key] = np.full(rows, self.step, dtype=np.int64), before
        found: tuple[Steps, Steps] = self._times[key]
        return found

    def _extrapolated(self, index: int, weights: Weights) -> Values:
        values, earlier = self.stored(index)
        if not any(weights):
            return values
        return tuple([along(value, before, weights) for value, *before in zip(values, *earlier, strict=True)])

    def record(self, stats: LazyStats) -> None:
        """Count this call, once it has succeeded."""
        rows = np.array([self.signatures[index][-1] for index in range(len(self.weights))], dtype=np.float64)
        stats.record_step(self.step, np.array([weights is None for weights in self.weights]), rows)


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
        signatures: of the branches at a call of these sizes; None if they are not known.
    """
    special = config.cache_dtype or config.cache_device or config.max_cache_bytes
    if special or signatures is None or len(groups) != 1 or not _decides_before_step(policy):
        return None
    (group,) = groups
    decided = spread(policy.decided(group.step, group.timestep, group.before, state.memory), len(columns))
    slopes = policy.slopes(group.step, group.timestep, group.before)
    warm, limit = group.step < config.warmup_steps, config.max_reuse_age
    lines: dict[tuple[int, int], _Line | None] = {}
    result: list[Weights | None] = []
    for index, column in enumerate(columns):
        slot, leader = state.slots.get(index), leaders[index]
        if leader > index:
            return None
        if column is None or slot is None or slot.signature != signatures[index]:
            result.append(None)
            continue
        key = (id(slot.computed_at), id(slot.computed_before))
        if key not in lines:
            lines[key] = _line(slot, group.step)
        line, answer = lines[key], decided[column]
        if line is None or (answer is None and leader == index):
            return None
        if leader != index:
            computes = result[leader] is None
        else:
            computes = warm or bool(answer) or (limit is not None and group.step - line.at > limit)
        if computes or line.at == NEVER:
            result.append(None)
        else:
            lead = columns[leader]
            slope = 1.0 if slopes is None or lead is None else slopes[lead]
            result.append(tuple([slope * weight for weight in line.weights]))
    behind = reused_behind(policy, len(columns), [group.step])
    alone = all(leader == index == column for index, (leader, column) in enumerate(zip(leaders, columns, strict=True)))
    alone = alone and behind is not None and len(behind) == len(columns)
    keeps = [
        column is not None and (behind is None or bool(behind[index] if alone else behind.any()))
        for index, column in enumerate(columns)
    ]
    return KnownStep(state, group.step, result, signatures, config.values_kept - 1, keeps)


def _decides_before_step(policy: Policy) -> bool:
    """Whether the rule is one that is not asked at a branch."""
    kind = type(policy)
    return policy.known_before_step and kind.should_compute is Policy.should_compute and kind.observe is Policy.observe


@dataclass(frozen=True)
class _Line:
    """When all rows of a slot were computed last, and how they go on from there, see :func:`extrapolation_weights`."""

    at: int
    weights: Weights


def _line(slot: CacheSlot, step: int) -> _Line | None:
    """None if the rows differ."""
    at, before = slot.computed_at, slot.computed_before
    if (at != at[0]).any() or (before != before[:, :1]).any():
        return None
    weights = extrapolation_weights(np.array([step]), at[:1], before[:, :1])
    return _Line(int(at[0]), tuple(weights[:, 0].tolist()))


def columns_of(branches: Sequence[ResidualBranch], planned: Mapping[str, ResidualBranch] | None) -> list[int | None]:
    """For each branch its index among those that a policy was made for, see :class:`PolicyStep`."""
    if planned is None:
        return list(range(len(branches)))
    found = [planned.get(branch.name) for branch in branches]
    return [
        other.index if other is not None and other.kind == branch.kind else None
        for branch, other in zip(branches, found, strict=True)
    ]
