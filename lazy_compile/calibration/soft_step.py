"""One differentiable call: every branch computes and is mixed with its cache by its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazy_compile.config import LazyConfig
from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.gate_table import compute_logit, pool, should_compute
from lazy_compile.runtime.cache import CacheSlot, CacheState


@dataclass
class SoftStep:
    """``y = c f(Z) + (1 - c) reuse`` with ``c = sigmoid(compute_logit)``; implements ``LazyStep``.

    Gradients reach the gates through c, and the activations through f and Z. The caches are as stale as they will be at
    inference: a row whose gate says reuse keeps what it had, and what is reused is formed by the configured reuse arm.

    Attributes:
        gates: ``(weight, bias)`` of every branch at this step.
        caches: slots of the stream; filled here.
        step: index in the trajectory; before ``config.warmup_steps`` every branch computes.
        slopes: how far each branch follows its line; None: all the way.
        logits: of the branches that could choose, by branch index.
        pooled: what each gate read, averaged over the rows, by branch index.
        reused: share of the rows that each branch would have reused, by branch index.
    """

    gates: Sequence[tuple[Tensor, Tensor]]
    config: LazyConfig
    caches: CacheState
    step: int
    slopes: Sequence[float] | None = None
    logits: dict[int, Tensor] = field(default_factory=dict)
    pooled: dict[int, Tensor] = field(default_factory=dict)
    reused: dict[int, float] = field(default_factory=dict)

    @property
    def reused_share(self) -> float:
        """Share of the branches, rows counted singly, that would have been reused."""
        return sum(self.reused.values()) / len(self.reused) if self.reused else 0.0

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        index, rows = branch.branch.index, branch.rows(inputs)
        fresh = branch.compute(inputs)
        slot = self.caches.slots.get(index)
        self.reused[index] = 0.0
        self.pooled[index] = pool(branch.branch, branch.entries(inputs)).mean(0)
        if slot is None or self.step < self.config.warmup_steps:
            self._store(slot, index, branch.kept(inputs, fresh), np.ones(rows, dtype=bool), branch)
            return fresh
        logit = compute_logit(branch.branch, branch.entries(inputs), *self.gates[index])
        self.logits[index] = logit
        computes = should_compute(logit.detach()).cpu().numpy()
        if not branch.branch.row_separable:
            computes = np.full(rows, computes.any())
        self.reused[index] = 1.0 - float(computes.mean())
        reused = branch.restored(inputs, self._reuse(slot, branch))
        mixed = tuple(
            _mix(old, new, torch.sigmoid(logit), output.batch_axis)
            for old, new, output in zip(reused, fresh, branch.branch.outputs, strict=True)
        )
        self._store(slot, index, branch.kept(inputs, fresh), computes, branch)
        return mixed

    def _reuse(self, slot: CacheSlot, branch: LazyBranch) -> tuple[Tensor, ...]:
        slope = 1.0 if self.slopes is None else self.slopes[branch.branch.index]
        rows = len(slot.computed_at)
        return slot.extrapolated(np.full(rows, self.step), np.full(rows, slope), branch.branch)

    def _store(
        self, slot: CacheSlot | None, index: int, kept: tuple[Tensor, ...], computes: Any, branch: LazyBranch
    ) -> None:
        values = tuple(value.detach() for value in kept)
        now = np.full(len(computes), self.step, dtype=np.int64)
        if slot is None:
            self.caches.slots[index] = CacheSlot.first(values, now)
            return
        axes = [output.batch_axis for output in branch.branch.outputs]
        rows = torch.from_numpy(computes).to(values[0].device)

        def choose(new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(torch.where(_along(rows, a, axis), a, b) for a, b, axis in zip(new, old, axes, strict=True))

        order = self.config.values_kept - 1
        self.caches.slots[index] = slot.renewed(choose(values, slot.values), now, order, computes, choose)


def _mix(reused: Tensor, fresh: Tensor, share: Tensor, batch_axis: int | None) -> Tensor:
    weight = _along(share.to(fresh.dtype), fresh, batch_axis)
    return reused + weight * (fresh - reused)


def _along(rows: Tensor, tensor: Tensor, batch_axis: int | None) -> Tensor:
    """One value per row, shaped to multiply ``tensor``."""
    shape = [1] * tensor.dim()
    if batch_axis is not None and len(rows) > 1:
        shape[batch_axis] = len(rows)
    return rows.reshape(shape)
