"""Schedules of few distinct rows: so many lean engines, CUDA graphs or compiled graphs serve all of their steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import ConfigError
from lazy_compile.policies.schedule import BoolTable, CacheSchedule

Floats = npt.NDArray[np.float64]


def pattern_count(schedule: CacheSchedule) -> int:
    """How many distinct rows a schedule has."""
    return len(np.unique(schedule.should_compute, axis=0))


def few_patterns(
    schedule: CacheSchedule, max_patterns: int, cost: Floats | None = None, leaders: Sequence[int] | None = None
) -> CacheSchedule:
    """The schedule with at most so many distinct rows, at no more cost: rows that are alike become one.

    Agglomerative clustering: of all pairs of patterns those two are joined that change the least compute, until few
    are left. A joined pattern computes those branches that most of its steps computed, as far as these can pay for.
    Steps that compute everything stay as they are. Slopes stay.

    Args:
        schedule: any.
        max_patterns: 2 or more; 1 if every step computes everything.
        cost: ``float64[G]`` of computing each branch; None if all cost the same.
        leaders: see :meth:`CacheSchedule.tied`; the schedule must do as they say.

    Raises:
        ConfigError: the first step computes everything, and one pattern is asked for where others do not.
    """
    if max_patterns < 1 or (max_patterns == 1 and pattern_count(schedule) > 1):
        raise ConfigError(
            f"max_patterns is {max_patterns}; the first step computes everything and others do not, ask for 2 or more"
        )
    table = schedule.should_compute
    price = np.ones(schedule.branches) if cost is None else np.asarray(cost, dtype=np.float64)
    heads = np.array(range(schedule.branches) if leaders is None else leaders)
    alone, group_of = np.unique(heads, return_inverse=True)
    prices: Floats = np.bincount(group_of, weights=price).astype(np.float64)
    whole = table.all(axis=1)
    steps = np.flatnonzero(~whole)
    _, kinds = np.unique(table[steps], axis=0, return_inverse=True)
    groups = [steps[kinds == kind].tolist() for kind in range(int(kinds.max()) + 1)] if len(steps) else []
    rows = table[:, alone]
    while len(groups) > max_patterns - 1:
        first, second = _cheapest_pair(rows, groups, prices)
        groups[first] += groups.pop(second)
    result = rows.copy()
    for group in groups:
        result[group] = _common_row(rows[group], prices)
    return CacheSchedule(result[:, group_of], schedule.slopes)


def _cheapest_pair(rows: BoolTable, groups: Sequence[list[int]], prices: Floats) -> tuple[int, int]:
    """The two groups of steps to join: with the least more change for it."""
    own = [_change(rows[group], prices) for group in groups]
    pairs = [(first, second) for second in range(len(groups)) for first in range(second)]
    return min(
        pairs, key=lambda pair: _change(rows[groups[pair[0]] + groups[pair[1]]], prices) - own[pair[0]] - own[pair[1]]
    )


def _change(rows: BoolTable, prices: Floats) -> float:
    """Compute that is added or dropped where some steps all do as their common row."""
    return float(((rows != _common_row(rows, prices)) * prices).sum())


def _common_row(rows: BoolTable, prices: Floats) -> BoolTable:
    """Those branches that most steps compute, as far as their mean cost goes."""
    share = rows.mean(axis=0)
    budget, row = float((rows * prices).sum(axis=1).mean()) * (1 + 1e-9), np.zeros(len(prices), dtype=bool)
    for branch in np.argsort(-share, kind="stable"):
        if share[branch] > 0 and prices[branch] <= budget:
            row[branch], budget = True, budget - prices[branch]
    return row
