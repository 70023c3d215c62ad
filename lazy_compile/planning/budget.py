"""How much a plan may spend, or lose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.reuse_effects import EffectTable
from lazy_compile.policies.schedule import CacheSchedule

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """How much to save, or to lose: exactly one of the four.

    Attributes:
        lazy_ratio: share of branch evaluations to reuse.
        compute_ratio: MACs to spend over dense MACs, always-on parts included.
        latency_ratio: time to spend over that of the dense model, by the timings of its branches.
        error: root mean square change of the final samples that may be caused, as cheaply as can be; for :func:`plan`.
    """

    lazy_ratio: float | None = None
    compute_ratio: float | None = None
    latency_ratio: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        ratios = [value for value in (self.lazy_ratio, self.compute_ratio, self.latency_ratio) if value is not None]
        if len(ratios) + (self.error is not None) != 1:
            raise ConfigError("a budget is a lazy_ratio, compute_ratio, latency_ratio or error; give exactly one")
        if ratios and not 0.0 < ratios[0] < 1.0:
            raise ConfigError(f"a budget lies between 0 and 1; seen {ratios[0]}")
        if self.error is not None and not self.error > 0.0:
            raise ConfigError(f"an error that may be caused is above 0; seen {self.error}")

    def cost_of(self, branches: Floats, total: float) -> Floats:
        """``float64[G]``: what computing each branch counts for, from the MACs or seconds of each and of a step."""
        return np.ones(len(branches)) if self.lazy_ratio is not None else branches / total

    def spend(self, steps: int, cost: Floats) -> float:
        """What the computed branches of a trajectory may cost in all."""
        if self.lazy_ratio is not None:
            return (1.0 - self.lazy_ratio) * steps * len(cost)
        ratio = self.compute_ratio if self.latency_ratio is None else self.latency_ratio
        assert ratio is not None
        return steps * (ratio - 1.0 + float(cost.sum()))

    def is_met_by(self, schedule: CacheSchedule, effects: EffectTable) -> bool:
        if self.lazy_ratio is not None:
            return schedule.lazy_ratio >= self.lazy_ratio
        ratio = self.compute_ratio if self.latency_ratio is None else self.latency_ratio
        assert ratio is not None
        return schedule.compute_ratio(effects.branch_macs.tolist(), effects.total_macs) <= ratio
