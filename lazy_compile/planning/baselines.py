"""Simple rules of the literature, a few lines each: what a calibrated model has to beat.

FORA and a random draw are constructors of :class:`~lazy_compile.policies.schedule.CacheSchedule`. TaylorSeer
(arXiv 2503.06923) of order 1 is FORA with ``reuse="linear"``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.ir.lazy_branch import LazyBranch
from lazy_compile.policies.policy import GateQuery, Policy
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.runtime.module import LazyModule, ModelCall
from lazy_compile.runtime.sampling import DenseStep, Sampler, require_finite

Floats = npt.NDArray[np.float64]


class _WholeStep(Policy):
    """One decision per call, taken by its first gated branch."""

    def observe(self, query: GateQuery) -> None:
        self._follow(query, True)

    def should_compute(self, query: GateQuery) -> bool:
        return self._follow(query, False)

    @abstractmethod
    def _follow(self, query: GateQuery, forced: bool) -> bool:
        """Whether this step computes; ``forced`` where there is no choice."""


@dataclass(frozen=True)
class AccumulatedChange(_WholeStep):
    """TeaCache (arXiv 2411.19108) without its fitted polynomial: reuse everything until the relative changes of the
    first modulated input, added up since the last computation, reach ``threshold``."""

    threshold: float

    def _follow(self, query: GateQuery, forced: bool) -> bool:
        memory = query.memory
        if query.branch.index == 0:
            total = float(memory.get("total", 0.0)) + relative_change(query.entries[0], memory.get("entry"))  # type: ignore[arg-type]
            computes = forced or total >= self.threshold
            memory.update(entry=query.entries[0].detach(), total=0.0 if computes else total, computes=computes)
        return bool(memory["computes"])


@dataclass(frozen=True)
class FirstBlockChange(_WholeStep):
    """First-Block-Cache (ParaAttention): the first ``branches`` always compute; the others do if what leaves the first
    block changed by ``threshold``, relatively, since they last did."""

    threshold: float
    branches: int = 2

    def _follow(self, query: GateQuery, forced: bool) -> bool:
        memory = query.memory
        if query.branch.index < self.branches:
            return True
        if query.branch.index == self.branches:
            change = relative_change(query.entries[0], memory.get("entry"))
            memory["computes"] = forced or change >= self.threshold
            if memory["computes"]:
                memory["entry"] = query.entries[0].detach()
        return bool(memory["computes"])


def relative_change(now: Tensor, before: Any) -> float:
    """``mean |now - before| / mean |before|``; infinite where there is nothing to compare with."""
    if not isinstance(before, Tensor) or before.shape != now.shape:
        return float("inf")
    change, size = float((now - before).abs().mean()), float(before.abs().mean())
    return change / size if size > 0 else (float("inf") if change > 0 else 0.0)


def measure_changes(lazy: LazyModule, sample: Sampler, *, seed: int = 0, max_age: int = 8) -> Floats:
    """``float64[T, max_age, G]``: relative change of every branch's output against that of 1, 2, ... steps before."""
    latest: deque[dict[int, tuple[Tensor, ...]]] = deque(maxlen=max_age)
    changes: list[Floats] = []

    def drive(call: ModelCall) -> Any:
        watching = _Watching()
        result = call.run(watching)
        changes.append(np.full((max_age, len(lazy.branches)), np.inf))
        for age, before in enumerate(latest):
            for branch, values in watching.outputs.items():
                changes[-1][age, branch] = max(map(relative_change, values, before[branch]))
        latest.appendleft(watching.outputs)
        return result

    with torch.no_grad(), lazy.call_handler(drive):
        require_finite(sample(lazy, seed))
    return np.stack(changes)


def smoothcache_schedule(changes: Floats, threshold: float) -> CacheSchedule:
    """SmoothCache (arXiv 2411.10510): reuse while the output differs by less than ``threshold`` from the cached one."""
    steps, max_age, branches = changes.shape
    table = np.ones((steps, branches), dtype=bool)
    for branch in range(branches):
        age = 0
        for step in range(1, steps):
            reuses = age < max_age and changes[step, age, branch] < threshold
            table[step, branch] = not reuses
            age = age + 1 if reuses else 0
    return CacheSchedule(table)


@dataclass
class _Watching(DenseStep):
    outputs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        fresh = branch.compute(inputs)
        self.outputs[branch.branch.index] = branch.kept(inputs, fresh)
        return fresh


@dataclass
class TaylorStep:
    """TaylorSeer: the polynomial of ``order`` through the last computed outputs, where a schedule reuses.

    Implements :class:`~lazy_compile.ir.lazy_branch.LazyStep`. ``history`` belongs to a trajectory: for each branch the
    steps at which it computed, latest first, with what it produced.
    """

    schedule: CacheSchedule
    order: int
    step: int
    history: dict[int, list[tuple[int, tuple[Tensor, ...]]]]

    def evaluate(self, branch: LazyBranch, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        known = self.history.setdefault(branch.branch.index, [])
        if self.schedule.should_compute[self.step, branch.branch.index]:
            fresh = branch.compute(inputs)
            known.insert(0, (self.step, branch.kept(inputs, fresh)))
            del known[self.order + 1 :]
            return fresh
        weights = _lagrange([at for at, _ in known], self.step)
        reused = [
            torch.stack([weight * output for weight, output in zip(weights, outputs, strict=True)]).sum(0)
            for outputs in zip(*(values for _, values in known), strict=True)
        ]
        return branch.restored(inputs, reused)


def taylor_samples(lazy: LazyModule, sample: Sampler, schedule: CacheSchedule, order: int, seed: int) -> Tensor:
    """What a schedule samples if a reused output is extrapolated by a polynomial of ``order``."""
    history: dict[int, list[tuple[int, tuple[Tensor, ...]]]] = {}
    with torch.no_grad(), lazy.call_handler(lambda call: call.run(TaylorStep(schedule, order, call.step, history))):
        return sample(lazy, seed)


def _lagrange(places: Sequence[int], at: int) -> list[float]:
    """Weights with which values at ``places`` give the value at ``at`` of the polynomial through them."""
    return [float(np.prod([(at - other) / (place - other) for other in places if other != place])) for place in places]
