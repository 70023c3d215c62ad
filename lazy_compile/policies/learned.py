"""The policy of calibrated gates: each branch decides by what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from lazy_compile.errors import ConfigError, shown
from lazy_compile.ir.branch import ResidualBranch
from lazy_compile.policies.gate_table import FORCE, GateRow, GateTable, compute_logit, should_compute
from lazy_compile.policies.policy import GATES, Decisions, GateQuery, Policy, require_keys


@dataclass(frozen=True)
class Learned(Policy, kind="learned"):
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

    @property
    def known_before_step(self) -> bool:
        return self.delayed

    @property
    def reads_gates(self) -> bool:
        return True

    @property
    def steps(self) -> int | None:
        one_trajectory = self.table.trajectory is None and self.table.interpolation == "nearest"
        return len(self.table.knots) if one_trajectory else None

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> Decisions:
        if not self.delayed:
            return None
        said = memory.get(GATES)
        return True if said is None else list(said)  # type: ignore[call-overload]

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
        return query.average(compute_logit(query.branch, query.entries, weight, bias)) + self.shift

    def slopes(self, step: int, timestep: float, before: float | None) -> Sequence[float] | None:
        return self.table.slopes(timestep, before)

    def mismatch_reason(self, step: int, timestep: float, before: float | None) -> str:
        if before is None or not self.table.is_foreign(timestep, before):
            return ""
        return (
            "the gates were calibrated on other timesteps than this sampler visits, and reuse at the wrong steps; "
            "calibrate with the sampler and the number of steps that you sample with, or with several of them"
        )

    @property
    def gate_table(self) -> GateTable:
        """With the shift."""
        return self.table.shifted(self.shift) if self.shift else self.table

    def check(self, branches: Sequence[ResidualBranch]) -> None:
        features = tuple(branch.gate_features for branch in branches)
        if self.table.features != features:
            raise ConfigError(
                f"the gate table is for {len(self.table.features)} branches with {sum(self.table.features)} features, "
                f"the model has {len(branches)} with {sum(features)}; calibrate gates for this model"
            )

    def describe(self) -> str:
        when = "by what they read at the step before" if self.delayed else "by the activations of the step"
        return f"calibrated gates decide for each branch {when}, with shift {self.shift:g}"

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values = {
            "shift": float(self.shift),
            "delayed": self.delayed,
            "interpolation": self.table.interpolation,
            "features": list(self.table.features),
        }
        return values, self.table.tensors

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        require_keys(values, {"shift": float, "delayed": bool, "interpolation": str, "features": list})
        if missing := sorted({"knots", "weight", "bias"} - set(tensors)):
            raise ConfigError(f"the gates hold no tensor {missing[0]!r}")
        if unknown := sorted(set(tensors) - {"knots", "weight", "bias", "slope", "trajectory"}):
            raise ConfigError(f"the gates hold an unknown tensor {shown(unknown[0])}")
        if not all(type(count) is int and 0 <= count < 2**31 for count in values["features"]):
            raise ConfigError(f"policy.features are {shown(values['features'])}, expected a number for each branch")
        table = GateTable(tuple(values["features"]), **tensors, interpolation=values["interpolation"])
        return cls(table, values["shift"], values["delayed"])

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
