"""Plans from the effects of single reuses, and how sure each decision is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.planning.budget import Budget
from lazy_compile.planning.reuse_effects import EffectTable
from lazy_compile.policies.schedule import CacheSchedule

Floats = npt.NDArray[np.float64]

AGE_EXPONENT = 2.5
"""How fast the effect of a reuse grows with its age in steps; measured on small class-conditional transformers."""


@dataclass(frozen=True)
class PlannedReuse:
    """A schedule, and how sure of each decision it is.

    Attributes:
        schedule: the decisions.
        margin: ``float64[T, G]``, extra cost of the best schedule that reuses here over the best that computes here, in
            units of what computing here costs: positive computes, negative reuses, +inf at step 0.
        price: final mean squared error that one unit of computing is worth under the budget.
    """

    schedule: CacheSchedule
    margin: Floats
    price: float


def margins_of(schedule: CacheSchedule, harm: Floats, cost: Floats) -> PlannedReuse:
    """How sure a schedule that was searched for is of its decisions, from the harm of reuse around it.

    Args:
        schedule: the decisions; a margin never contradicts one.
        harm: from :func:`~lazy_compile.planning.linear_model.harm_of_reuse`.
        cost: ``float64[G]`` of computing each branch.
    """
    worth = harm[1:] / np.maximum(cost, 1e-9)
    computed = schedule.should_compute[1:]
    least = LEAST_PRICE * float(np.median(np.abs(worth)))
    price = max(float(np.quantile(worth, 1 - computed.mean())), least, float(np.finfo(np.float64).tiny))
    margin = np.full(harm.shape, np.inf)
    relative = worth / price - 1
    margin[1:] = np.where(computed, np.maximum(relative, MIN_MARGIN), np.minimum(relative, -MIN_MARGIN))
    return PlannedReuse(schedule, margin, price)


LEAST_PRICE = 0.1
"""Of computing, over the typical worth of a decision: a price near 0 would make every decision look sure."""

MIN_MARGIN = 0.25
"""Margin of a decision that the measurement would take the other way."""


def plan_reuse(effects: EffectTable, budget: Budget) -> PlannedReuse:
    """Lagrangian relaxation: each branch is planned alone at a common price, found by bisection.

    The effects of single reuses are taken to add up, and to grow with the age of what is reused as
    ``age ** AGE_EXPONENT``. For one branch the best plan at a price is then a shortest path over (step, age).

    Raises:
        ConfigError: the budget cannot be met, since the first step computes everything.
    """
    cost = budget.cost_of(effects.branch_macs, effects.total_macs)

    def at(price: float) -> PlannedReuse:
        margins = np.stack(
            [_margins(effects.final[:, branch], price * cost[branch]) for branch in range(len(cost))], axis=1
        )
        return PlannedReuse(CacheSchedule(margins >= 0), margins, price)

    finite = effects.final[np.isfinite(effects.final)]
    scale = float(finite.mean()) if len(finite) and finite.any() else 1.0
    low, high = _bracket(lambda price: budget.is_met_by(at(price).schedule, effects), scale)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if budget.is_met_by(at(middle).schedule, effects) else (middle, high)
    return at(high)


def _bracket(is_met: Callable[[float], bool], scale: float) -> tuple[float, float]:
    price = scale * 1e-9
    for _ in range(100):
        if is_met(price):
            return price / 10, price
        price *= 10
    raise ConfigError(
        "this budget cannot be met, since the first step computes everything; ask for less reuse, or more steps"
    )


def _margins(effect: Floats, price: float) -> Floats:
    """``float64[T]``: cost of the best path that reuses at a step less that of the best that computes, per price.

    ``arriving[t, a]``: least cost of the steps before t, if the cache is a steps old at t.
    ``leaving[t, a]``: least cost of the steps from t on, if the cache is a steps old at t.
    """
    steps = len(effect)
    ages = np.arange(steps + 2)
    penalty = np.where(ages > 0, ages, 1.0) ** AGE_EXPONENT
    reuse = np.nan_to_num(effect, nan=np.inf)[:, None] * penalty[None, :]
    arriving = np.full((steps + 1, steps + 2), np.inf)
    arriving[0, 1] = 0.0
    for step in range(steps):
        arriving[step + 1, 1] = arriving[step].min() + price
        arriving[step + 1, 2:] = np.minimum(arriving[step + 1, 2:], (arriving[step] + reuse[step])[1:-1])
    leaving = np.zeros((steps + 1, steps + 2))
    for step in reversed(range(steps)):
        older = np.append(leaving[step + 1, 1:], np.inf)
        leaving[step] = np.minimum(price + leaving[step + 1, 1], reuse[step] + older)
    margin = np.full(steps, np.inf)
    for step in range(1, steps):
        older = np.append(leaving[step + 1, 1:], np.inf)
        computes = arriving[step].min() + price + leaving[step + 1, 1]
        reuses = (arriving[step] + reuse[step] + older).min()
        margin[step] = (reuses - computes) / price
    return margin
