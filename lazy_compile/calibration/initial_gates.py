"""What gates start from: a planned schedule, how sure it is of each decision, and gates that repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazy_compile.planning.budget import Budget
from lazy_compile.planning.linear_model import harm_of_reuse
from lazy_compile.planning.planner import search_schedule
from lazy_compile.planning.reuse_effects import measure_effects
from lazy_compile.planning.sample_response import NoGradientError, measure_response
from lazy_compile.planning.search import HELD_OUT_SEED_OFFSET
from lazy_compile.planning.single_reuses import MIN_MARGIN, PlannedReuse, margins_of, plan_reuse
from lazy_compile.policies.gate_table import GateTable
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.progress import OnProgress
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import Sampler

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GateStart:
    """What gates start from.

    Attributes:
        planned: the schedule that they repeat until they are trained, with its slopes.
        timesteps: ``float64[T]``, the time input at each step.
        sensitivity: ``float64[T]``, change of the final samples per change of the model's output at a step.
    """

    planned: PlannedReuse
    timesteps: Floats
    sensitivity: Floats

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything by name, for a checkpoint."""
        schedule = self.planned.schedule
        arrays = {
            "should_compute": schedule.should_compute,
            "margin": self.planned.margin,
            "price": np.array(self.planned.price),
            "timesteps": self.timesteps,
            "sensitivity": self.sensitivity,
        }
        if schedule.slopes is not None:
            arrays["slopes"] = schedule.slopes
        return {name: np.array(array) for name, array in arrays.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> GateStart:
        """The reverse of :meth:`to_arrays`; tensors will do."""
        read = {name: np.asarray(array) for name, array in arrays.items()}
        schedule = CacheSchedule(read["should_compute"], read.get("slopes"))
        planned = PlannedReuse(schedule, read["margin"], float(read["price"]))
        return cls(planned, read["timesteps"], read["sensitivity"])


def gate_start(
    lazy: LazyModule,
    budget: Budget,
    sample: Sampler,
    schedule: CacheSchedule | None,
    seed: int,
    on_progress: OnProgress,
) -> GateStart:
    """Search a schedule, unless one is given, and measure how sure each of its decisions is.

    Where the samples carry no gradient, everything comes from the effects of single reuses.
    """
    try:
        schedule = schedule or search_schedule(lazy, sample, budget, seed=seed, on_progress=on_progress)
        response = measure_response(
            lazy, sample, schedule, seed=seed + HELD_OUT_SEED_OFFSET // 2, directions=DIRECTIONS
        )
    except NoGradientError:
        effects = measure_effects(lazy, sample, seed=seed, on_progress=on_progress)
        return GateStart(plan_reuse(effects, budget), effects.timesteps, effects.sensitivity)
    assert response.timesteps is not None
    assert response.sensitivity is not None
    planned = margins_of(schedule, harm_of_reuse(response), branch_cost(lazy, budget))
    return GateStart(planned, response.timesteps, response.sensitivity)


DIRECTIONS = 4
"""Of the measurement that says how sure a plan is of its decisions."""


def branch_cost(lazy: LazyModule, budget: Budget) -> Floats:
    """``float64[G]``: what computing each branch once counts for."""
    return budget.cost_of(np.array([branch.macs for branch in lazy.branches], float), float(lazy.graph.total_macs))


def initial_gates(lazy: LazyModule, start: GateStart, knots: int | None) -> GateTable:
    """Gates that repeat the planned schedule whatever they read: the bias is how sure the plan is of each decision."""
    schedule, margin = start.planned.schedule, np.clip(start.planned.margin, -MAX_MARGIN, MAX_MARGIN)
    margin = np.where(schedule.should_compute & (margin <= 0), MIN_MARGIN, margin)  # a gate reuses at 0
    slopes = schedule.slopes
    steps = np.arange(len(start.timesteps))
    places = steps if knots is None else np.linspace(0, steps[-1], knots)

    def at_places(columns: Floats) -> Tensor:
        return torch.from_numpy(np.stack([np.interp(places, steps, column) for column in columns.T], axis=1)).float()

    table = GateTable.constant(lazy.branches, torch.from_numpy(np.interp(places, steps, start.timesteps)))
    return replace(
        table,
        bias=at_places(margin),
        slope=None if slopes is None else at_places(slopes),
        interpolation="nearest" if knots is None else "linear",
    )


MAX_MARGIN = 4.0
"""Bias of a decision that the plan is sure of: sigmoid(4) = 0.98."""
