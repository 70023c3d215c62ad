"""Rules that decide at run time whether a branch computes or reuses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lazy_compile.errors import ConfigError
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.policies.gate_table import FORCE, GateRow, GateTable, compute_logit, should_compute
from lazy_compile.policies.schedule import CacheSchedule


@dataclass(frozen=True)
class GateQuery:
    """The question that a branch puts to the policy.

    Attributes:
        branch: who asks.
        entries: its modulated inputs.
        step: index of the sampler step in this trajectory, from 0.
        timestep: the model's time input, or the step index where the model has none.
        before: that of the step before; None at the first.
        memory: a dictionary of this stream, emptied at every new trajectory, for rules that accumulate.
    """

    branch: ResidualBranch
    entries: Sequence[Tensor]
    step: int
    timestep: float
    before: float | None
    memory: dict[str, object]


class Policy(ABC):
    """Decides; the runtime still computes where nothing is cached, in the warm-up, and at ``max_reuse_age``.

    Attributes:
        reads_entries: whether decisions depend on a branch's inputs, and so on how wide these are.
    """

    reads_entries: ClassVar[bool] = True

    @abstractmethod
    def should_compute(self, query: GateQuery) -> bool | Tensor:
        """True or False for the whole call, or ``bool[B]`` with one decision per row."""

    def observe(self, query: GateQuery) -> None:  # noqa: B027, few rules look back
        """What is asked where there is no choice: nothing is cached yet, or the model warms up."""

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        """For each branch how far linear reuse follows its line: 1 all the way, 0 not at all. None: all the way."""
        return None

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        """Why this policy was not made for a trajectory that has such a step, in words; empty if it may have been."""
        return ""

    def check(self, branches: Sequence[ResidualBranch]) -> None:  # noqa: B027, not every policy belongs to a model
        """Raise :class:`ConfigError` if this policy was made for another model."""


@dataclass(frozen=True)
class AlwaysCompute(Policy):
    """Never reuses: the transformed model equals the original bit for bit."""

    reads_entries: ClassVar[bool] = False

    def should_compute(self, query: GateQuery) -> bool:
        return True


@dataclass(frozen=True)
class Scheduled(Policy):
    """Follows a :class:`CacheSchedule` by step index; steps beyond its end compute."""

    reads_entries: ClassVar[bool] = False
    schedule: CacheSchedule

    def should_compute(self, query: GateQuery) -> bool:
        if query.step >= self.schedule.steps:
            return True
        return bool(self.schedule.should_compute[query.step, query.branch.index])

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        slopes = self.schedule.slopes
        return None if slopes is None or step >= len(slopes) else slopes[step].tolist()

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        if step < self.schedule.steps:
            return ""
        return (
            f"the schedule has {self.schedule.steps} steps and the trajectory more, in which every branch computes; "
            "plan with the number of steps that you sample with"
        )

    def check(self, branches: Sequence[ResidualBranch]) -> None:
        if self.schedule.branches != len(branches):
            raise ConfigError(
                f"the schedule has {self.schedule.branches} branches, the model has {len(branches)}; "
                "plan a schedule for this model"
            )


@dataclass(frozen=True)
class Learned(Policy):
    """Asks the calibrated gates.

    Attributes:
        table: from calibration.
        shift: added to every compute logit: the quality dial. Positive computes more, negative reuses more.
        delayed: decide by the logits of the step before, which a host knows before a step begins; the first computes.
    """

    table: GateTable
    shift: float = 0.0
    delayed: bool = False
    _rows: dict[tuple[float, float | None, torch.device], list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def should_compute(self, query: GateQuery) -> Tensor:
        logit, before = self._logit(query), query.memory.get(_memory_of(query))
        if self.delayed:
            query.memory[_memory_of(query)] = logit
            known = isinstance(before, Tensor) and before.shape == logit.shape
            logit = before if known else torch.full_like(logit, FORCE)  # type: ignore[assignment]
        return should_compute(logit)

    def observe(self, query: GateQuery) -> None:
        if self.delayed:
            query.memory[_memory_of(query)] = self._logit(query)

    def _logit(self, query: GateQuery) -> Tensor:
        weight, bias = self._gates(query.timestep, query.before, query.entries[0].device)[query.branch.index]
        return compute_logit(query.branch, query.entries, weight, bias) + self.shift

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        return self.table.slopes(timestep, before)

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        if before is None or not self.table.is_foreign(timestep, before):
            return ""
        return (
            "the gates were calibrated on other timesteps than this sampler visits, and reuse at the wrong steps; "
            "calibrate with the sampler and the number of steps that you sample with, or with several of them"
        )

    def row(self, timestep: float, before: float | None) -> GateRow:
        """The gates of one step with the shift, for a host that hands them to an exported model."""
        row = self.table.row(timestep, before)
        return GateRow(row.weight, row.bias + self.shift)

    def check(self, branches: Sequence[ResidualBranch]) -> None:
        features = tuple(branch.gate_features for branch in branches)
        if self.table.features != features:
            raise ConfigError(
                f"the gate table is for {len(self.table.features)} branches with {sum(self.table.features)} features, "
                f"the model has {len(branches)} with {sum(features)}; calibrate gates for this model"
            )

    def _gates(self, timestep: float, before: float | None, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        key = (timestep, before, device)
        gates = self._rows.get(key)
        if gates is None:
            if len(self._rows) >= 4096:
                self._rows.clear()
            gates = self._rows[key] = split_row(self.table.row(timestep, before), self.table.features, device)
        return gates


def _memory_of(query: GateQuery) -> str:
    return f"compute_logit_{query.branch.index}"


def split_row(row: GateRow, features: Sequence[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """``(weight, bias)`` of every branch, on ``device``."""
    weights = row.weight.to(device).split(list(features))
    return list(zip(weights, row.bias.to(device).unbind(), strict=True))
